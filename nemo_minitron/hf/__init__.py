"""Hugging Face checkpoints on disk."""
