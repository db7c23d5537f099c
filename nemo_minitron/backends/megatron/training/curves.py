"""Training curves as JSON lines, mirrored to TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch.utils.tensorboard import SummaryWriter

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.system.files import write_whole

WANDB_ID_FILE = "wandb_run_id"


@dataclass(frozen=True)
class Tracker:
    """A project of Weights & Biases and the run's name in it."""

    project: str
    run_name: str
    stage: str
    log_dir: Path
    """Holds wandb's files in `wandb/`. Unlike the work folder it is kept, because an offline run is synced later."""

    def open(self, folder: Path) -> Any:
        """Open the run; a resumed training continues the run whose id is stored in the work folder.

        Raises:
            EnvironmentProblem: the package is missing, or the service cannot be reached.
        """
        try:
            import wandb
        except ImportError as error:
            raise EnvironmentProblem(
                "execution.wandb_project is set, but the package wandb is not installed.",
                next_step='pip install "nemo-minitron[tracking]", or leave out execution.wandb_project.',
            ) from error
        id_file = folder / WANDB_ID_FILE
        if not id_file.is_file():
            id_file.write_text(uuid4().hex)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(
                project=self.project,
                name=self.run_name,
                job_type=self.stage,
                id=id_file.read_text(),
                resume="allow",
                dir=str(self.log_dir),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise EnvironmentProblem(
                f"Weights & Biases cannot be used: {error}",
                next_step="`wandb login`, or set WANDB_MODE=offline and `wandb sync` later.",
            ) from error
        # wandb's own step may never decrease, but a resumed run repeats the steps after its checkpoint.
        run.define_metric("*", step_metric="step")
        return run


class Curves:
    """Appends rows; a resumed run first drops the rows after its checkpoint.

    Args:
        folder: holds curves.jsonl and tensorboard/.
        first_step: rows after this step are dropped; -1 drops all.
        enabled: True on the main rank, the only one that writes.
        tracker: optional Weights & Biases run.
    """

    def __init__(self, folder: Path, *, first_step: int, enabled: bool, tracker: Tracker | None = None) -> None:
        self.path = folder / "curves.jsonl"
        self.rows = [row for row in read_curves(self.path) if row["step"] <= first_step] if enabled else []
        self._writer, self._run = None, None
        self._enabled = enabled
        if enabled:
            self.flush()
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
            self._run = None if tracker is None else tracker.open(folder)

    def add(self, step: int, **values: float) -> None:
        """Record values of the state after `step` steps."""
        if not self._enabled:
            return
        self.rows.append({"step": step, **values})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"distill/{name}", value, step)
        if self._run is not None:
            self._run.log({"step": step, **values})

    def flush(self) -> None:
        """Rewrite the file from the rows in memory."""
        if self._enabled:
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def has(self, key: str) -> bool:
        """Return whether any row has this key."""
        return any(key in row for row in self.rows)

    def is_validated(self, step: int) -> bool:
        """Return whether there is a validation of the state after this step."""
        return any(row["step"] == step and any(key.startswith("valid_") for key in row) for row in self.rows)

    def first(self, key: str) -> float:
        return float(next(row[key] for row in self.rows if key in row))

    def last(self, key: str) -> float:
        return float(next(row[key] for row in reversed(self.rows) if key in row))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()


def read_curves(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a curve file; ignore a last line that a kill has truncated."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
