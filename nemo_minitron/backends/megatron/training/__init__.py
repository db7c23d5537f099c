"""The training loop, optimizer, checkpoints and curves."""
