"""The context of a running stage: everything that it uses besides its params and inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.compared import LOGITS_FILE
from nemo_minitron.artifacts.run_paths import COMPARED
from nemo_minitron.errors import Interrupted
from nemo_minitron.schema.execution import Execution
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.runtime.session import Session


@dataclass(frozen=True)
class StageContext:
    """Folders, progress display, execution settings and Megatron session of a running stage."""

    name: str
    recipe_name: str
    out_dir: Path
    """Folder for outputs; the runner publishes it when the stage's function returns."""
    work_dir: Path
    """Folder for state that must survive a kill, such as checkpoints. It is removed when the stage is published."""
    execution: Execution
    progress: Progress
    session: Session | None = None
    """The Megatron session of a distributed stage."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Stop request that long computations check regularly."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files: rank 0 of a distributed stage, or the only process."""
        return self.session is None or self.session.is_main

    def check_stop(self) -> None:
        """Raise Interrupted if a stop was requested. Call it where the work folder has all finished parts."""
        self._stop_for(self.stop.source())

    def check_stop_of_all_ranks(self) -> None:
        """Raise Interrupted on every rank if a stop was requested of any; all ranks call this at the same point.

        A stage that stops by itself needs it wherever its ranks work together: only rank 0 is notified of a stop, and
        the others would wait for it in their next collective operation.
        """
        reasons = self.open_session.gather(self.stop.source())
        self._stop_for(next((reason for reason in reasons if reason is not None), None))

    def _stop_for(self, reason: str | None) -> None:
        if reason is not None:
            raise Interrupted(
                f"Stopped in stage {self.name} as requested by {reason}; finished parts are kept, "
                "the same command continues."
            )

    @property
    def logits_memory(self) -> Path:
        """File that lists the models of the run whose logits in transformers and Megatron have been compared."""
        return self.run_dir / COMPARED / LOGITS_FILE

    @property
    def run_dir(self) -> Path:
        """Folder of the run, which holds the outputs of its other stages."""
        return self.out_dir.parent

    @property
    def open_session(self) -> Session:
        """Megatron session of a distributed stage; the runner has opened it."""
        if self.session is None:
            raise AssertionError(f"stage {self.name} runs outside of a Megatron session")
        return self.session
