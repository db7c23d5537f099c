"""The one door to Megatron-Core and torch.distributed."""
