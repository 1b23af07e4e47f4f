"""Groundwork for a study on real weights: two pretrained models and photographs, all from packages."""
