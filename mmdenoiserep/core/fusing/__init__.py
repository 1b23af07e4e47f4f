"""Fuses models and state dicts, and compares fused models with denoised ones."""
