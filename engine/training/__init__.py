"""The training loop: trainer, pipeline, update, optimiser."""
