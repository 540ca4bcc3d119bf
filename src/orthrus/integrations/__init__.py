"""Orthrus inside other engines, and asked by evaluation harnesses."""
