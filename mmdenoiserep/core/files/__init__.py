"""Files: reading those of strangers without running their code, writing them all or nothing, fusing them."""
