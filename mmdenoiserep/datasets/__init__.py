"""Data sets and samplers for re-identification."""
