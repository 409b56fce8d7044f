"""Torch heads. Many small heads, one a fold and seed, are one module with a leading axis `heads`."""
