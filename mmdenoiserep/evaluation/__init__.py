"""Metrics for re-identification and boundary IoU."""
