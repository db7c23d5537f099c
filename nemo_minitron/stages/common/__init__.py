"""What several kinds of stage share. Stages import this, and never each other."""
