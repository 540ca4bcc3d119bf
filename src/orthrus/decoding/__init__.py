"""Decoding rules without a model: they take tensors and numbers, and return small values."""
