"""Metrics that the libraries lack."""
