"""Importance scores from forward and backward passes of a Megatron model."""
