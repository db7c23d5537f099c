"""Running planned stages: the runner, its ranks, and the folders that they work in."""
