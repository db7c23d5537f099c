"""Rounds of a training step: how far the teacher runs ahead of the student. No torch, because the planner needs it."""

from __future__ import annotations

MICRO_BATCHES_PER_STAGE = 8
"""Micro-batches of a round per pipeline stage. Each round fills and empties the pipeline once: with P stages and M
micro-batches in a round, the stages are idle for (P - 1) / (M + P - 1) of the time, here at most 1 / 9."""


def round_size(pp: int, *, teacher_is_live: bool, teacher_learns: bool) -> int | None:
    """Return the largest number of micro-batches whose teacher targets exist at the same time.

    Without pipeline stages, a teacher that is only evaluated runs one micro-batch at a time when the student requests
    it. A teacher that learns, or one with pipeline stages, has a schedule of its own, which runs before the student's.

    Returns:
        None if the targets of all micro-batches of a step can be computed in one round, one at a time.
    """
    if pp > 1 and (teacher_is_live or teacher_learns):
        return MICRO_BATCHES_PER_STAGE * pp
    return 1 if teacher_learns else None


def round_sizes(num_micro_batches: int, largest: int | None) -> list[int]:
    """Divide the micro-batches of a step into the smallest number of rounds, of nearly equal sizes."""
    if largest is None:
        return [num_micro_batches]
    count = -(-num_micro_batches // largest)
    return [num_micro_batches * (i + 1) // count - num_micro_batches * i // count for i in range(count)]
