"""The clipped policy loss, from log-probabilities or from logits."""
