"""One file for each kind of stage, and the runner."""
