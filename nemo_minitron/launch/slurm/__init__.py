"""The launcher for Slurm: one batch job, job array or chain of jobs per stage."""
