"""Small layers of decoder models on fused kernels, for the CPU and for GPUs."""
