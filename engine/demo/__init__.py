"""Where the demo starts: tiny models and the warm start."""
