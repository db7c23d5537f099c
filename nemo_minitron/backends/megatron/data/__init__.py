"""Datasets and indexed files in Megatron's formats."""
