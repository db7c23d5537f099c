"""Measurements of a model's quality and speed."""
