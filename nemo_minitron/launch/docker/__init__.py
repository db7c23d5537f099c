"""The launcher for containers on this machine: each stage in docker or Apptainer, one after the other."""
