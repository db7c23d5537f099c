"""Execution of planned stages: the runner, its ranks, and their work folders."""
