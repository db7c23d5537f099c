"""Sessions, process groups, CPU support, and differences between versions of Megatron-Core."""
