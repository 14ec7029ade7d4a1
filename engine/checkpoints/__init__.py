"""Checkpoints: what a run saves and goes on from, and an adapter merged into its base model."""
