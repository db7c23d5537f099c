"""Planning of a run before it starts: stages, fingerprints, checks and costs. Imports no torch."""
