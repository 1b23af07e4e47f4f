"""Reads files without running their code, writes files atomically, and fuses checkpoint files."""
