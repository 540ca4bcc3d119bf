"""Orthrus inside other engines."""
