"""NeMo-Aligner, in an environment of its own: files go in and come out, nothing of it is imported here."""
