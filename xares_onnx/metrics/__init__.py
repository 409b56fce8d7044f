"""Metrics of predictions, and the bootstrap interval of any of them."""
