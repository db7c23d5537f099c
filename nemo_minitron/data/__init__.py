"""Converting text to Megatron indexed datasets, and chats to training text."""
