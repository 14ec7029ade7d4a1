"""Small layers of transformers on fused kernels, for the CPU and for GPUs."""
