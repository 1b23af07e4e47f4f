"""Data sets and samplers that the libraries lack."""
