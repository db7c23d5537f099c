"""The computational load of a stage: memory of each process, tokens and floating-point operations."""
