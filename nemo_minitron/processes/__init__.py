"""Starting the processes of a stage on one or several nodes."""
