"""Load a multiple-choice task of lm-eval."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nemo_minitron.errors import DataError, PlanError
from nemo_minitron.evaluation.tasks import data_errors, offline, offline_name, quiet, require_known, write_offline_tasks
from nemo_minitron.pruning.choice_task import ChoiceTask

METRICS = ("acc_norm", "acc")
"""What a task is judged by: the first of these that it has."""


def load_choice_task(name: str, tokenizer: Any, *, data_dir: Path | None, limit: int | None) -> ChoiceTask:
    """Questions and answers of a task, zero-shot, from the first example on.

    Args:
        data_dir: folder with <task>/validation.arrow; None lets lm-eval fetch from the hub.

    Raises:
        PlanError: lm-eval does not know the task, it is no multiple-choice task, or has no offline data.
        DataError: offline data that cannot be read.
    """
    from lm_eval.tasks import TaskManager, get_task_dict

    with tempfile.TemporaryDirectory() as scratch, offline(data_dir is not None), quiet(), data_errors(data_dir):
        if data_dir is not None:
            write_offline_tasks([name], data_dir, Path(scratch))
            manager = TaskManager(include_path=scratch, include_defaults=False)
        else:
            manager = TaskManager()
            require_known([name], manager.all_tasks)
        known = offline_name(name) if data_dir else name
        task = get_task_dict([known], manager)[known]
        if getattr(task, "OUTPUT_TYPE", None) != "multiple_choice":
            raise PlanError(f"Task {name} is not a multiple-choice task.", where="depth_task.name")
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    if not task.instances:
        raise DataError(f"Task {name} has no example.", where=str(data_dir or "the hub"))
    instances = tuple(sorted(task.instances, key=lambda instance: (instance.doc_id, instance.idx)))
    metric = next((metric for metric in METRICS if metric in task.aggregation()), None)
    if metric is None:
        raise PlanError(f"Task {name} has no accuracy.", where="depth_task.name", allowed=", ".join(METRICS))
    pairs = tuple(_encode(tokenizer, *instance.args) for instance in instances)
    return ChoiceTask(name, pairs, metric, task, instances)


def _encode(tokenizer: Any, question: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """As lm-eval does.

    Spaces between the two belong to the answer, they are tokenized together, and a tokenizer that begins every text
    with a bos token does so here.
    """
    spaces = len(question) - len(question.rstrip())
    if spaces:
        question, answer = question[:-spaces], question[-spaces:] + answer
    whole = tokenizer.encode(question + answer)
    start = len(tokenizer.encode(question))
    return tuple(whole[:start]), tuple(whole[start:])
