"""Folds denoisers into weights, and compares what comes out."""
