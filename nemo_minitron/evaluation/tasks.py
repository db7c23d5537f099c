"""Downstream tasks by lm-eval, with offline copies of their data if a folder is given."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from nemo_minitron.errors import CheckpointError, DataError, EnvironmentProblem, PlanError
from nemo_minitron.evaluation.choices import Answer, score_answers
from nemo_minitron.evaluation.sharing import share_out
from nemo_minitron.hf.tokenizer import require_known_ids
from nemo_minitron.hf.transformers_versions import network_errors

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.runtime.session import Session
    from nemo_minitron.system.progress import Progress

FALLBACK_BATCH_SIZE = 16
"""Batch size of requests that `score_answers` cannot process: texts to generate, contexts that must be truncated."""
DATA_FILE = "validation.arrow"
"""File of an offline copy: <folder>/<name of the task in lm-eval>/validation.arrow."""
Scores = dict[str, dict[str, float]]
_TOKENS = list[tuple[tuple[str, str], list[int], list[int]]]


class TaskResults(NamedTuple):
    """Scores of the tasks of an evaluation."""

    scores: Scores
    """Task -> {acc, acc_stderr, acc_norm, ...}: lm-eval's metrics of each task."""
    lower_is_better: dict[str, list[str]]
    """Task -> its metrics of which a lower value is better, if it has any."""


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data_dir: Path | None,
    limit: int | None,
    work_dir: Path,
    progress: Progress,
    session: Session | None = None,
) -> TaskResults:
    """Return zero-shot scores; empty ones on other ranks than the first.

    Args:
        model: a model of transformers in eval mode.
        data_dir: folder with <task>/validation.arrow; None: lm-eval fetches the data from the hub.
        limit: examples of each task, from the first on; None: all.
        work_dir: folder for task files and the datasets cache, which are removed afterwards.
        session: its ranks share out the questions; all of them call this function, and rank 0 gets the scores.

    Raises:
        EnvironmentProblem: lm-eval is not installed, or the hub cannot be reached.
        PlanError: lm-eval does not have a task, or a task has no offline data.
        DataError: offline data cannot be read, or tokens are outside the model's vocabulary.
        CheckpointError: the tokenizer has no eos token, which lm-eval uses for an empty context.
    """
    _require_usable(tokenizer)
    import lm_eval
    from lm_eval.tasks import TaskManager

    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work_dir) as scratch, offline(data_dir is not None), quiet():
        if data_dir is None:
            manager = TaskManager()
            _require_no_tags(tasks, manager.all_tags)
            require_known(tasks, manager.all_tasks)
        else:
            write_offline_tasks(tasks, data_dir, Path(scratch))
            # The stock tasks take seconds to list and are not needed: each file names the stock file that it includes.
            manager = TaskManager(include_path=scratch, include_defaults=False)
        names = [offline_name(task) for task in tasks] if data_dir else list(tasks)
        with data_errors(data_dir):
            found = lm_eval.simple_evaluate(
                _language_model(model, tokenizer, progress, session),
                tasks=names,
                num_fewshot=0,
                limit=limit,
                task_manager=manager,
                log_samples=False,
            )
    if found is None:  # lm-eval returns the scores on the first rank of a node only
        return TaskResults({}, {})
    scores = {task: read_scores(found["results"][name]) for task, name in zip(tasks, names, strict=True)}
    for task in (task for task, some in scores.items() if not some):
        progress.warn(f"lm-eval has no score of its own for {task}: name the tasks of this group instead.")
    directions = {task: found["higher_is_better"].get(name, {}) for task, name in zip(tasks, names, strict=True)}
    lower = {task: [metric for metric, higher in some.items() if higher is False] for task, some in directions.items()}
    return TaskResults(scores, {task: metrics for task, metrics in lower.items() if metrics})


def _require_no_tags(tasks: Sequence[str], tags: Sequence[str]) -> None:
    """Refuse tags, which name several tasks and have no scores of their own.

    Raises:
        PlanError: a name is a tag.
    """
    for task in tasks:
        if task in tags:
            raise PlanError(
                f"{task} is a tag of lm-eval, not a task: it has no score of its own.",
                next_step=f"Name its tasks, which `lm-eval ls tags` lists below {task}.",
            )


def require_lm_eval(otherwise: str) -> None:
    """Raise EnvironmentProblem unless lm-eval can be imported.

    Args:
        otherwise: how to do without it, for the message.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            f"lm-eval cannot be imported: {error}", next_step=f"pip install 'nemo-minitron[eval]', or {otherwise}"
        ) from error


def _require_usable(tokenizer: Any) -> None:
    """Require an installed lm-eval, and a tokenizer with the end-of-text token that it needs."""
    require_lm_eval("set tasks=[]")
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            "The tokenizer has no end-of-text token, which lm-eval needs.",
            where=str(tokenizer.name_or_path),
            next_step='Set "eos_token" in tokenizer_config.json.',
        )


def offline_name(task: str) -> str:
    """Return the name of a task with offline data, which differs from that of the stock task."""
    return f"{task}_offline"


def write_offline_tasks(tasks: Sequence[str], data_dir: Path, folder: Path) -> None:
    """Write one YAML file for each task: it includes lm-eval's own, and reads the data from an arrow file.

    Raises:
        PlanError: there is no such task, or no data for it.
    """
    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent
    for task in tasks:
        data = data_dir / task / DATA_FILE
        if not data.is_file():
            present = ", ".join(sorted(file.parent.name for file in data_dir.glob(f"*/{DATA_FILE}")))
            raise PlanError(f"There is no offline data for task {task}.", where=str(data_dir), allowed=present)
        document = {
            "include": str(_stock_file(stock, task)),
            "task": offline_name(task),
            "dataset_path": "arrow",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(data.resolve())}, "cache_dir": str(folder / "cache")},
            "training_split": None,
            "validation_split": "validation",
            "test_split": None,
            "fewshot_split": "validation",
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")


def _stock_file(stock: Path, task: str) -> Path:
    """Return lm-eval's YAML file of a task, found by the task name inside the file."""
    for file in sorted(stock.rglob(f"*{task}*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        if any(line.split("#")[0].strip() in (f"task: {task}", f'task: "{task}"') for line in lines):
            return file
    raise PlanError(f"lm-eval has no task {task} that can run offline.")


def read_scores(result: Mapping[str, Any]) -> dict[str, float]:
    """Convert {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...} of lm-eval to {"acc": 0.5, "acc_stderr": 0.1}."""
    numbers = {key: value for key, value in result.items() if "," in key and isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}


def require_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raise PlanError for a name that is not a task of lm-eval: it would be read as a file, which can run code."""
    for task in tasks:
        if task not in known:
            near = ", ".join(difflib.get_close_matches(task, known, 5))
            raise PlanError(f"lm-eval has no task {task}.", allowed=near or "see `lm-eval ls tasks`")


def _language_model(model: Any, tokenizer: Any, progress: Progress, session: Session | None) -> Any:
    """Return lm-eval's wrapper of a transformers model, changed to process every question once, on one rank.

    The wrapper gets a loaded model. From a name, it would join the other ranks of the stage by itself.
    """
    from lm_eval.models.huggingface import HFLM

    vocab_size, where = model.config.vocab_size, str(tokenizer.name_or_path)

    class SharedQuestions(HFLM):  # type: ignore[misc]
        def tok_batch_encode(self, strings: list[str], **options: Any) -> Any:
            ids, mask = super().tok_batch_encode(strings, **options)
            require_known_ids([int(ids.max())], vocab_size, tokenizer, where)
            return ids, mask

        def generate_until(self, requests: list[Any], **options: Any) -> list[str]:
            compute = partial(super().generate_until, **options)
            return share_out(requests, range(len(requests)), compute, session)

        def _loglikelihood_tokens(self, requests: _TOKENS, **options: Any) -> list[Answer]:
            questions = [tuple(question) for _, question, _ in requests]
            return share_out(requests, questions, partial(self._answers, **options), session)

        def _answers(self, requests: _TOKENS, **options: Any) -> list[Answer]:
            for _, question, answer in requests:
                require_known_ids(chain(question, answer), vocab_size, tokenizer, where)
            window = getattr(model.config, "sliding_window", None) or self.max_length
            longest = min(self.max_length, window)
            fits = [len(question) + len(answer) <= longest for _, question, answer in requests]
            pairs = [(question, answer) for (_, question, answer), fit in zip(requests, fits, strict=True) if fit]
            with progress.bar("lm-eval", len(requests), "answers") as bar:
                short = iter(score_answers(model, pairs, tick=bar.advance))
                rest = [request for request, fit in zip(requests, fits, strict=True) if not fit]
                long = iter(super()._loglikelihood_tokens(rest, **options) if rest else [])
                bar.advance(len(rest))
            return [next(short if fit else long) for fit in fits]

    return SharedQuestions(model, tokenizer=tokenizer, backend="causal", batch_size=FALLBACK_BATCH_SIZE)


@contextmanager
def data_errors(data_dir: Path | None) -> Iterator[None]:
    """Convert errors of the datasets library into our own errors."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from pyarrow import ArrowInvalid

    try:
        yield
    except (DatasetGenerationError, ArrowInvalid) as error:
        raise DataError(
            f"The data of a task cannot be read: {error.__cause__ or error}",
            where=str(data_dir or "the hub"),
            next_step="Fetch it again.",
        ) from error
    except ValueError as error:
        if "unsafe" not in str(error):
            raise
        raise PlanError(
            "A task runs code that the model writes, which is not supported.", next_step="Choose other tasks."
        ) from error
    except (DatasetNotFoundError, ConnectionError, *network_errors()) as error:
        raise EnvironmentProblem(
            f"The data of a task cannot be fetched: {error}",
            next_step="Check the network, or set tasks_source to offline copies (asset:offline-eval-tasks).",
        ) from error


@contextmanager
def offline(active: bool) -> Iterator[None]:
    """Keep the datasets and hub libraries offline inside the context."""
    if not active:
        yield
        return
    import datasets.config as datasets_config
    import huggingface_hub.constants as hub_constants

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    flags = (datasets_config.HF_HUB_OFFLINE, hub_constants.HF_HUB_OFFLINE)
    os.environ.update(dict.fromkeys(names, "1"))
    # Both libraries read the variables only at import.
    datasets_config.HF_HUB_OFFLINE = hub_constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets_config.HF_HUB_OFFLINE, hub_constants.HF_HUB_OFFLINE = flags
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log output of lm-eval and datasets."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        # Progress bars of lm-eval ignore all settings.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
