"""Helpers that every other part of the core may import."""
