"""The record of the Slurm launcher."""

from __future__ import annotations

from nemo_minitron.launch.base import Launcher
from nemo_minitron.launch.slurm.probe import inspect
from nemo_minitron.launch.slurm.states import states
from nemo_minitron.launch.slurm.submit import cancel, render, submit
from nemo_minitron.schema.cluster import Cluster


def program(cluster: Cluster) -> str:
    """Return the program that submits jobs."""
    return "sbatch"


LAUNCHER = Launcher("slurm", render, submit, states, cancel, program, inspect)
