"""The table of stage kinds. Importing it is cheap: no torch; functions are named, not imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts.compared import COMPARED, LOGITS_FILE
from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.config.schema import Execution, Schema
from nemo_minitron.config.schema.base import TEMPLATE_DATE
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.runtime.session import Session

Result = Mapping[str, Any]
"""JSON facts for the manifest."""


@dataclass(frozen=True)
class StageContext:
    """What a stage may use besides its params and inputs."""

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


StageFunction = Callable[[Any, Inputs, StageContext], Result]


@dataclass(frozen=True)
class StageSpec:
    """One kind of stage."""

    kind: str
    version: int
    """Raised when the same inputs would now give other outputs; part of the fingerprint."""
    entry: str
    """`module:function`; called as function(params, inputs, ctx)."""
    distributed: bool = False
    """Runs on execution.parallel.world_size processes inside a Megatron session."""
    starts_ranks: bool = False
    """Has a layout, and starts its processes itself: they run in another environment."""
    reads_results: bool = False
    """Of many stages it reads figures and small files, not their weights."""
    one_gpu: bool = False
    """Has no layout, and is faster on a GPU."""
    needs_aligner: bool = False
    """Runs where NeMo-Aligner is."""

    @property
    def has_layout(self) -> bool:
        return self.distributed or self.starts_ranks

    @property
    def uses_gpu(self) -> bool:
        return self.has_layout or self.one_gpu

    def load(self) -> StageFunction:
        module, function = self.entry.split(":")
        return getattr(import_module(module), function)


def _spec(kind: str, entry: str, *, version: int = 1, **flags: bool) -> StageSpec:
    return StageSpec(kind, version, f"nemo_minitron.stages.{entry}", **flags)


STAGES: dict[str, StageSpec] = {
    spec.kind: spec
    for spec in (
        _spec("import", "import_model.run:import_model"),
        _spec("adopt", "adopt.run:adopt"),
        _spec("init", "init.run:init"),
        _spec("tokenize", "tokenize.run:tokenize"),
        _spec("chat_data", "chat_data.run:chat_data", version=2),
        _spec("sft", "align.run:sft", starts_ranks=True, needs_aligner=True),
        _spec("steerlm_sft", "align.run:sft", starts_ranks=True, needs_aligner=True),
        _spec("dpo", "align.run:dpo", starts_ranks=True, needs_aligner=True),
        _spec("distill_offline", "distill_offline.run:distill_offline", starts_ranks=True, needs_aligner=True),
        _spec("train_attribute_model", "align.run:train_attribute_model", starts_ranks=True, needs_aligner=True),
        _spec("annotate", "annotate.run:annotate", one_gpu=True, needs_aligner=True),
        _spec("evaluate_chat", "evaluate_chat.run:evaluate_chat", version=2, one_gpu=True),
        _spec("check_teacher", "check_teacher.run:check_teacher", distributed=True),
        _spec("score", "score.run:score", version=2, distributed=True),
        _spec("candidate", "search.candidate:candidate", distributed=True),
        _spec("search", "search.run:search", reads_results=True),
        _spec("select", "select.run:select", version=2),
        _spec("prune", "prune.run:prune", version=2),
        _spec("cache_teacher", "cache_teacher.run:cache_teacher", version=2, distributed=True),
        _spec("distill", "distill.run:distill", version=3, distributed=True),
        _spec("train", "train.run:train", distributed=True),
        _spec("correct", "train.run:train", distributed=True),
        _spec("evaluate", "evaluate.run:evaluate", distributed=True),
        _spec("speed", "speed.run:speed", one_gpu=True),
        _spec("export", "export.run:export"),
        _spec("report", "report.run:report", reads_results=True),
    )
}


def params_of(stage: Schema) -> dict[str, Any]:
    """The part of a stage's config that decides its output: not its kind, its inputs, nor when training gives up."""
    left_out = {"kind": True, "inputs": True, "guard": True, "retraining": {"guard": True}}
    dump: dict[str, Any] = stage.model_dump(mode="json", exclude=left_out)  # type: ignore[arg-type]
    if dump.get("template_date") == TEMPLATE_DATE.isoformat():
        # The key is newer than many runs; at its default it leaves their fingerprints as they are.
        del dump["template_date"]
    return dump
