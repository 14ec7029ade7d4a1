"""A transformer block as one differentiable function, with its attention and its kernels."""
