"""Small layers of decoder models on fused CPU kernels."""
