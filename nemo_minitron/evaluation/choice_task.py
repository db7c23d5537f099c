"""Loading of multiple-choice tasks of lm-eval as token ids."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError, DataError, PlanError
from nemo_minitron.evaluation.tasks import (
    data_errors,
    offline,
    offline_name,
    quiet,
    require_known,
    require_lm_eval,
    write_offline_tasks,
)
from nemo_minitron.pruning.choice_task import ChoiceTask

METRICS = ("acc_norm", "acc")
"""Metrics by priority: a task is measured by the first one that it has."""


def load_choice_task(name: str, tokenizer: Any, *, data_dir: Path | None, limit: int | None) -> ChoiceTask:
    """Load the questions and answers of a task, zero-shot.

    Args:
        data_dir: folder with <task>/validation.arrow; None: lm-eval fetches the data from the hub.
        limit: maximum number of examples, from the first on; None: all.

    Raises:
        EnvironmentProblem: lm-eval is not installed.
        PlanError: lm-eval does not have the task, or it is not a multiple-choice task or has no offline data.
        DataError: offline data that cannot be read, or an answer without a token of its own.
        CheckpointError: the tokenizer has no token to put in front of an answer without a question.
    """
    require_lm_eval("take `task` out of layer_metrics")
    from lm_eval.tasks import TaskManager, get_task_dict

    with tempfile.TemporaryDirectory() as scratch, offline(data_dir is not None), quiet(), data_errors(data_dir):
        if data_dir is not None:
            write_offline_tasks([name], data_dir, Path(scratch))
            manager = TaskManager(include_path=scratch, include_defaults=False)
        else:
            manager = TaskManager()
            require_known([name], manager.all_subtasks)
        known = offline_name(name) if data_dir else name
        task = get_task_dict([known], manager)[known]
        if getattr(task, "OUTPUT_TYPE", None) != "multiple_choice":
            raise PlanError(f"Task {name} is not a multiple-choice task.", where="depth_task.name")
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    if not task.instances:
        raise DataError(f"Task {name} has no examples.", where=str(data_dir or "the hub"))
    instances = tuple(sorted(task.instances, key=lambda instance: (instance.doc_id, instance.idx)))
    metric = next((metric for metric in METRICS if metric in task.aggregation()), None)
    if metric is None:
        raise PlanError(f"Task {name} has no accuracy metric.", where="depth_task.name", allowed=", ".join(METRICS))
    pairs = tuple(_encode(tokenizer, *instance.args) for instance in instances)
    if empty := next((instance for instance, pair in zip(instances, pairs, strict=True) if not pair[1]), None):
        raise DataError(
            f"An answer of task {name} has no token of its own: {empty.args!r}", next_step="Choose another task."
        )
    return ChoiceTask(name, pairs, metric, task, instances)


def _encode(tokenizer: Any, question: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokenize a question and an answer as lm-eval does.

    Both are tokenized together. Spaces between them belong to the answer. A bos token that the tokenizer adds is kept.
    If there is no question, the answer follows bos, or eos where there is none.

    Raises:
        CheckpointError: there is no question, and the tokenizer has neither token.
    """
    if not question:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise CheckpointError(
                "The task has empty questions, and the tokenizer has neither a bos nor an eos token.",
                where=str(tokenizer.name_or_path),
                next_step='Set "eos_token" in tokenizer_config.json.',
            )
        return (first,), tuple(tokenizer.encode(answer, add_special_tokens=False))
    spaces = len(question) - len(question.rstrip())
    if spaces:
        question, answer = question[:-spaces], question[-spaces:] + answer
    whole = tokenizer.encode(question + answer)
    start = len(tokenizer.encode(question))
    return tuple(whole[:start]), tuple(whole[start:])
