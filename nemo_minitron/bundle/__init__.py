"""Packing recipes with all their inputs, wheels and an install script into one file for a machine without a network."""
