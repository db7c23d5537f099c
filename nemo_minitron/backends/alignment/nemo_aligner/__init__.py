"""NeMo-Aligner as an alignment backend. It runs in its own environment and exchanges files with this package."""
