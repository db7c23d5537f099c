"""Downstream tasks through lm-eval, with offline copies of their data when a source is given."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.errors import EnvironmentProblem, PlanError

BATCH_SIZE = 16
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_METRICS = ("acc", "acc_norm")


def run_tasks(
    model_dir: Path, tasks: Sequence[str], *, data_dir: Path | None, limit: int | None, precision: str, device: str
) -> dict[str, dict[str, float]]:
    """Zero-shot scores: task -> {acc, acc_stderr, acc_norm, acc_norm_stderr} (those that the task has).

    Args:
        data_dir: folder with <task>/validation.arrow; None lets lm-eval fetch from the hub.
        limit: examples per task; None: all.

    Raises:
        EnvironmentProblem: lm-eval is not installed.
        PlanError: a task has no offline data.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EnvironmentProblem(
            f"lm-eval cannot be imported: {error}", next_step="pip install 'nemo-minitron[eval]', or set tasks=[]"
        ) from error
    with tempfile.TemporaryDirectory() as scratch, _quiet(), _offline(data_dir is not None):
        include = _render_tasks(tasks, data_dir, Path(scratch)) if data_dir else None
        model = HFLM(str(model_dir), dtype=_DTYPES[precision], device=device, batch_size=BATCH_SIZE, backend="causal")
        manager = TaskManager(verbosity="ERROR", include_path=str(include) if include else None)
        names = [_local(task) if data_dir else task for task in tasks]
        found = lm_eval.simple_evaluate(
            model, tasks=names, num_fewshot=0, limit=limit, task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
        )
    return {task: _scores(found["results"][name]) for task, name in zip(tasks, names, strict=True)}


def _local(task: str) -> str:
    return f"{task}_offline"


def _render_tasks(tasks: Sequence[str], data_dir: Path, folder: Path) -> Path:
    """One YAML for each task: lm-eval's own, with the data read from an arrow file."""
    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent
    for task in tasks:
        data = data_dir / task / "validation.arrow"
        if not data.is_file():
            present = ", ".join(sorted(path.name for path in data_dir.iterdir() if path.is_dir()))
            raise PlanError(f"There is no offline data for task {task}.", where=str(data_dir), allowed=present)
        document = {
            "include": str(_stock_file(stock, task)),
            "task": _local(task),
            "dataset_path": "arrow",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(data.resolve())}},
            "training_split": None,
            "validation_split": "validation",
            "test_split": None,
            "fewshot_split": "validation",
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(document))
    return folder


def _stock_file(stock: Path, task: str) -> Path:
    """lm-eval's YAML of a task, by the name inside it."""
    for file in sorted(stock.rglob(f"*{task}*.yaml")):
        if any(line.split("#")[0].strip() in (f"task: {task}", f'task: "{task}"') for line in file.open()):
            return file
    raise PlanError(f"lm-eval has no task {task} that can be run offline.")


def _scores(result: dict[str, Any]) -> dict[str, float]:
    """acc and acc_norm with their binomial standard errors."""
    count = result.get("sample_len") or result.get("samples") or 0
    out: dict[str, float] = {}
    for metric in _METRICS:
        value = result.get(f"{metric},none")
        if value is not None:
            out[metric] = float(value)
            error = result.get(f"{metric}_stderr,none")
            if isinstance(error, int | float):
                out[f"{metric}_stderr"] = float(error)
            elif count:
                out[f"{metric}_stderr"] = (float(value) * (1 - float(value)) / count) ** 0.5
    return out


@contextmanager
def _offline(active: bool) -> Iterator[None]:
    """Keep the data and hub libraries off the network for the duration."""
    if not active:
        yield
        return
    import datasets.config as datasets_config
    import huggingface_hub.constants as hub_constants

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    flags = (datasets_config.HF_HUB_OFFLINE, hub_constants.HF_HUB_OFFLINE)
    os.environ.update(dict.fromkeys(names, "1"))
    # Both libraries read the variables once, at import.
    datasets_config.HF_HUB_OFFLINE = hub_constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets_config.HF_HUB_OFFLINE, hub_constants.HF_HUB_OFFLINE = flags
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets talk a lot; what matters is in the result."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        # Its bars ignore every switch.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
