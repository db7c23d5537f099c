"""Prune a large language model, distill it back, align it: the Minitron recipe as a package."""

__version__ = "0.1.0"
