"""The judge model behind an HTTP endpoint: prompts, replies, scores."""
