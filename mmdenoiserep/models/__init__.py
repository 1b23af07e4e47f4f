"""Models that the libraries lack."""
