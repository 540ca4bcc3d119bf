"""Trains views: corpora of the base's own answers, blocks drawn from them, losses, and the training loop."""
