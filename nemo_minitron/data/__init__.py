"""Text to Megatron indexed datasets; chats to training text."""
