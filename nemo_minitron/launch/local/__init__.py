"""The launcher for this machine and this Python environment."""
