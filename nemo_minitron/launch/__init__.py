"""Bring a recipe to the machines that run it: one sub-package per launcher, found by name in `registry`."""
