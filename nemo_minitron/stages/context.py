"""What a stage may use besides its params and inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.compared import LOGITS_FILE
from nemo_minitron.artifacts.run_paths import COMPARED
from nemo_minitron.schema.execution import Execution
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.runtime.session import Session


@dataclass(frozen=True)
class StageContext:
    """The run around a stage: its folders, its progress, and the Megatron session."""

    name: str
    recipe_name: str
    out_dir: Path
    """Write outputs here; the runner publishes the folder when the function returns."""
    work_dir: Path
    """Survives a kill; training state lives here. Removed when the stage is published."""
    execution: Execution
    progress: Progress
    session: Session | None = None
    """The Megatron session of a distributed stage."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Long work looks here whether it should end early."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files (rank 0)."""
        return self.session is None or self.session.is_main

    @property
    def logits_memory(self) -> Path:
        """Which models of the run have been compared between transformers and Megatron."""
        return self.out_dir.parent / COMPARED / LOGITS_FILE

    @property
    def open_session(self) -> Session:
        """The session of a distributed stage, which the runner has opened."""
        if self.session is None:
            raise AssertionError(f"stage {self.name} runs outside a Megatron session")
        return self.session
