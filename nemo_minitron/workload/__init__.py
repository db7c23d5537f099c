"""What a stage asks of its processes: memory, tokens and floating-point operations."""
