"""Build, load, run and inspect Megatron models."""
