"""Frozen foundation models and how their weights are found, checked and loaded."""
