"""A transformer block as one differentiable function, its attention, and its kernels."""
