"""What the package asks about a kind of stage. Every kind fills in one `StageKind`; importing it is cheap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.base import StageParams
from nemo_minitron.schema.chats import ChatRowFacts
from nemo_minitron.schema.execution import Parallel

if TYPE_CHECKING:
    from nemo_minitron.stages.context import StageContext
    from nemo_minitron.workload.load import Load

Result = Mapping[str, Any]
"""Facts that a stage returns for its manifest; they must be JSON."""
StageFunction = Callable[[Any, Any, "StageContext"], Result]
"""Called as function(params, inputs, ctx). The type of `inputs` is a dataclass with a field for each input role; see
`nemo_minitron.stages.typed_inputs`."""


class Output(Enum):
    """What a stage publishes, as far as other stages read it."""

    MODEL = "model"
    """A Hugging Face model folder that can be trained and pruned."""
    EXPORTED_MODEL = "exported model"
    """A Hugging Face model folder with a model card, made to be given away."""
    TOKENIZER = "tokenizer"
    TOKENIZED_TEXT = "tokenized text"
    CHAT_ROWS = "chat rows"
    TEACHER_CHECK = "teacher check"
    SCORES = "scores"
    PRUNE_PLAN = "prune plan"
    SEARCH = "search result"
    CANDIDATE = "candidate"
    TEACHER_CACHE = "teacher cache"
    REWARD_MODEL = "reward model"
    EVALUATION = "evaluation"
    CHAT_EVALUATION = "chat evaluation"
    SPEED = "speed measurement"
    REPORT = "report"


MODELS = (Output.MODEL, Output.EXPORTED_MODEL)


@dataclass(frozen=True)
class Source:
    """Something outside the run that a stage reads."""

    key: str
    """Key of the stage that names it, such as `sources.0.source`."""
    location: str
    """`asset:NAME`, `hf:ORG/NAME`, a path, or a glob."""
    content: Literal["model", "text", "chats", "files"]
    """What is read there, which decides the files that count. `files`: every file below a folder."""
    revision: str | None = None
    """Branch, tag or commit on the Hugging Face Hub."""


@dataclass(frozen=True)
class TaskUse:
    """A task of lm-eval that a stage names."""

    key: str
    """Key of the stage that names the task."""
    name: str
    source_key: str
    """Key of the stage that says where the task's data are."""
    source: str | None
    """Where the task's data are; None: lm-eval downloads them."""
    runs: bool = True
    """Whether the stage runs the task; otherwise its name is only checked."""


@dataclass(frozen=True)
class TextUse:
    """How much text a training reads."""

    data: str
    """Name of the stage that tokenizes the text."""
    num_tokens: int


class RecipeView(Protocol):
    """What a kind of stage may ask about the recipe around a stage."""

    @property
    def stages(self) -> Mapping[str, StageParams]:
        """All stages of the recipe by name."""
        ...

    @property
    def assets_dir(self) -> Path: ...

    def shape(self, stage: str) -> ModelShape | None:
        """Shape of the model that a stage makes; None if it is not known yet, or the stage makes no model."""
        ...

    def planned_shape(self, stage: str) -> ModelShape | None:
        """Shape of the model that a prune plan leaves; None if it is not known yet, or the stage makes no plan."""
        ...

    def chat_rows(self, stage: str) -> ChatRowFacts | None:
        """Facts about the chat rows that a stage makes; None if it makes none."""
        ...

    def layout(self, stage: str) -> Parallel:
        """Parallel layout of a stage."""
        ...

    def published(self, stage: str, file: str) -> Path | None:
        """A file of a finished stage, compared with its checksum; None if the stage has not finished or it differs."""
        ...


def _nothing(*_: Any) -> tuple[()]:
    return ()


def _unknown(*_: Any) -> None:
    return None


def _num_tokens(result: Result) -> int | None:
    return result.get("num_tokens")


def _all_inputs(name: str, params: Any, inputs: Mapping[str, Any], view: RecipeView) -> Mapping[str, Any]:
    return inputs


@dataclass(frozen=True)
class StageKind:
    """One kind of stage.

    Hooks get the stage's params, and where they need more, its name before them and the recipe around it behind them.
    """

    name: str
    params: type[StageParams]
    run: str
    """The function that does the work, as `module:function`; it is imported when a stage runs."""
    outputs: tuple[Output, ...] = ()
    inputs: Mapping[str, tuple[Output, ...]] = field(default_factory=dict)
    """Input role -> the outputs that can fill it; a role that is not named takes any stage."""
    version: int = 1
    """Raised when the same inputs would now give other outputs; part of the fingerprint."""

    # What a stage of this kind needs.
    distributed: bool = False
    """It runs on execution.parallel.world_size processes inside a Megatron session."""
    starts_ranks: bool = False
    """It has a layout, and starts its processes itself, because they run in another environment."""
    one_gpu: bool = False
    """It has no layout, and is faster on a GPU."""
    needs_aligner: bool = False
    """It runs in the environment of NeMo-Aligner."""
    whole_sequences: bool = False
    """It cannot work on parts of sequences, as context parallelism gives them."""
    loads_own_model: bool = False
    """It runs the model that it makes, not only those of its inputs."""
    reads_results: bool = False
    """It reads results and small files of many stages, but not their weights."""

    # How it trains and resumes.
    trains: bool = False
    """It trains a model on text: a long run whose evaluations are prepared before it begins."""
    stops_by_itself: bool = False
    """Its ranks write a checkpoint and end when they are asked to stop."""
    resumes_with_other_rates: bool = False
    """It can go on from a checkpoint that was made with another learning rate or other intervals."""

    # What it shows.
    report: str | None = None
    """Section of the report that it belongs to."""
    chat_rank: int | None = None
    """`minitron chat RUN` takes the finished model of the highest rank."""
    copied_to_run: str | None = None
    """Pattern of the files that are also copied into the run's folder."""

    # What can be said before it runs.
    sources: Callable[[Any], Iterable[Source]] = _nothing
    tasks: Callable[[Any], Iterable[TaskUse]] = _nothing
    text_use: Callable[[Any], TextUse | None] = _unknown
    expand: Callable[[str, Any, RecipeView], Mapping[str, StageParams] | None] = _unknown
    """The stages that this one stands for, itself included; None: only itself."""
    used_inputs: Callable[[str, Any, Mapping[str, Any], RecipeView], Mapping[str, Any]] = lambda _n, _p, inputs, _v: (
        inputs
    )
    """The inputs that are read, of those that the recipe names."""
    shape: Callable[[str, Any, RecipeView], ModelShape | None] = _unknown
    """Shape of the model that it makes."""
    planned_shape: Callable[[str, Any, RecipeView], ModelShape | None] = _unknown
    """For a prune plan: shape of the model that it leaves."""
    reduction: Callable[[str, Any, RecipeView], tuple[ModelShape | None, ModelShape | None] | None] = _unknown
    """For a stage that decides what to prune by importance: the shapes before and after; None for all others."""
    chat_rows: Callable[[str, Any, RecipeView], ChatRowFacts | None] = _unknown
    rated_rows: Callable[[Any], str | None] = _unknown
    """For a stage that rates chat rows: the stage that makes the rows."""
    points: Callable[[str, Any, RecipeView], Iterable[Mapping[str, Any]]] = _nothing
    """For a search: facts about each point of its grid."""
    problems: Callable[[str, Any, RecipeView], Iterable[str]] = _nothing
    """One line for each rule that the stage breaks, whatever the machine."""
    load: Callable[[str, Any, Parallel, RecipeView], Load | None] = _unknown
    """Its computation in a layout; None if sizes are not known or it computes nothing with a model."""
    disk_bytes: Callable[[Any, Load], int | None] = _unknown
    """Size of its output; None: that of a trained model with its checkpoints, or nothing."""
    source_disk_bytes: Callable[[str, int], int] = lambda _location, _num_bytes: 0
    """Disk space that a source takes while the stage runs, from its location and size."""
    array: Callable[[str, Any], str | None] = _unknown
    """Name of the job array that runs it beside others of its kind; None: a job of its own."""
    result_tokens: Callable[[Result], int | None] = _num_tokens
    """Tokens that a finished stage has processed."""
    rehearsal: str | None = None
    """A function, as `module:function`, that finds before a training what would stop this stage after it. It is called
    as function(name, params, training, stages, store, assets_dir) and raises DataError."""

    @property
    def has_layout(self) -> bool:
        """Whether it runs on several processes."""
        return self.distributed or self.starts_ranks

    @property
    def uses_gpu(self) -> bool:
        return self.has_layout or self.one_gpu

    def load_function(self) -> StageFunction:
        """Import the function that does the work."""
        return load_function(self.run)


def load_function(entry: str) -> Any:
    """Import a function that is named as `module:function`."""
    module, function = entry.split(":")
    return getattr(import_module(module), function)
