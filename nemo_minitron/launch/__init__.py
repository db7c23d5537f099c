"""From a plan to jobs: rendered by pure functions, submitted to Slurm or run in docker here."""
