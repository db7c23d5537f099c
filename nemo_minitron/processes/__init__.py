"""Start of the processes of a stage on one or several nodes."""
