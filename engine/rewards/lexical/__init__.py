"""The judge by word overlap with the reference."""
