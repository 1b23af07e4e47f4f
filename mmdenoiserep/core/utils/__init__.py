"""What the rooms of the core share."""
