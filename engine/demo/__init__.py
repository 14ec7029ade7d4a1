"""What the demo starts from: tiny models and the warm start."""
