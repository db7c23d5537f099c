"""The only package that imports Megatron-Core and torch.distributed."""
