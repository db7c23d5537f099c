"""What happened, for people and programs."""
