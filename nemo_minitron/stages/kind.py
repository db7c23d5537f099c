"""`StageKind`, the record by which the package knows a kind of stage. Importing it loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.base import StageParams
from nemo_minitron.schema.chats import ChatRowFacts
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.pruning import Target

if TYPE_CHECKING:
    from nemo_minitron.stages.context import StageContext
    from nemo_minitron.workload.load import Load

Result = Mapping[str, Any]
"""Facts that a stage returns for its manifest; they must be serializable as JSON."""
StageFunction = Callable[[Any, Any, "StageContext"], Result]
"""Called as function(params, inputs, ctx). The type of `inputs` is a dataclass with a field for each input role; see
`nemo_minitron.stages.typed_inputs`."""


class Output(Enum):
    """Types of stage outputs that other stages can read."""

    MODEL = "model"
    """A Hugging Face model folder that can be trained and pruned."""
    EXPORTED_MODEL = "exported model"
    """A Hugging Face model folder with a model card, ready for distribution."""
    TOKENIZER = "tokenizer"
    TOKENIZED_TEXT = "tokenized text"
    CHAT_ROWS = "chat rows"
    SAMPLED_ANSWERS = "sampled answers"
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
    """Key of the stage that holds the location, such as `sources.0.source`."""
    location: str
    """`asset:NAME`, `hf:ORG/NAME`, a path, or a glob."""
    content: Literal["model", "text", "chats", "files"]
    """Type of the content, which determines the files to list; `files` means every file below a folder."""
    revision: str | None = None
    """Branch, tag or commit on the Hugging Face Hub."""


@dataclass(frozen=True)
class TaskUse:
    """A task of lm-eval that a stage names."""

    key: str
    """Key of the stage that names the task."""
    name: str
    source_key: str
    """Key of the stage that holds the location of the task's data."""
    source: str | None
    """Location of the task's data; None: lm-eval downloads them."""
    runs: bool = True
    """Whether the stage runs the task; otherwise its name is only checked."""


@dataclass(frozen=True)
class TextUse:
    """Amount of text that a training or a repair reads."""

    data: str
    """Name of the stage that tokenizes the text."""
    num_tokens: int
    repeats_help: bool = True
    """Whether text that is read again still adds something, as it does to a training."""


@dataclass(frozen=True)
class HeldoutUse:
    """Amount of held-out text that a stage reads."""

    data: str
    """Name of the stage that tokenizes the text."""
    num_tokens: int
    key: str
    """Key of the stage that sets the amount."""


class RecipeView(Protocol):
    """The recipe around a stage, as the hooks of a kind see it."""

    @property
    def stages(self) -> Mapping[str, StageParams]:
        """All stages of the recipe by name."""
        ...

    @property
    def assets_dir(self) -> Path: ...

    def shape(self, stage: str) -> ModelShape | None:
        """Return the shape of the model that a stage makes; None if it is not known yet or the stage makes no model."""
        ...

    def planned_shape(self, stage: str) -> ModelShape | None:
        """Return the shape after pruning by a stage's plan; None if it is not known yet or the stage makes no plan."""
        ...

    def largest_candidate(self, search: str) -> Target | None:
        """Return sizes to estimate with in place of those that a search will find; None unless these are estimates."""
        ...

    def plan_of(self, stage: str) -> str | None:
        """Return the stage with the plan by which a stage's model was last cut; None if no stage of the recipe cut it.

        Stages that only train or repair a model leave its plan as it is.
        """
        ...

    def chat_rows(self, stage: str) -> ChatRowFacts | None:
        """Return facts about the chat rows that a stage makes; None if it makes none."""
        ...

    def layout(self, stage: str) -> Parallel:
        """Return the parallel layout of a stage."""
        ...

    def published(self, stage: str, file: str) -> Path | None:
        """Return a file of a finished stage; None if the stage has not finished or the file's checksum differs."""
        ...


def _nothing(*_: Any) -> tuple[()]:
    return ()


def _unknown(*_: Any) -> None:
    return None


def _num_tokens(result: Result) -> int | None:
    return result.get("num_tokens")


def training_text(params: Any) -> TextUse:
    """Return the text that a training reads; `text_use` of a kind that trains."""
    return TextUse(params.inputs.data, params.num_steps * params.global_batch_size * params.seq_len_tokens)


def calibration_text(params: Any) -> TextUse:
    """Return the text that least squares is fitted to; `text_use` of a kind with `num_samples` calibration samples."""
    return TextUse(params.inputs.data, params.num_samples * params.seq_len_tokens, repeats_help=False)


def validation_text(params: Any) -> Iterator[HeldoutUse]:
    """Yield the held-out text on which a stage validates; `heldout_uses` of a kind with `valid_num_tokens`."""
    yield HeldoutUse(params.inputs.data, params.valid_num_tokens, "valid_num_tokens")


def measured_text(params: Any) -> Iterator[HeldoutUse]:
    """Yield the held-out text on which a stage measures a model; `heldout_uses` of a kind with `num_tokens`."""
    yield HeldoutUse(params.inputs.data, params.num_tokens, "num_tokens")


def trained_tokens(result: Result) -> int | None:
    """Number of tokens that a training has read; a hook for `StageKind.result_tokens`."""
    return result.get("tokens")


def _all_inputs(name: str, params: Any, inputs: Mapping[str, Any], view: RecipeView) -> Mapping[str, Any]:
    return inputs


@dataclass(frozen=True)
class StageKind:
    """A kind of stage: its keys, inputs and outputs, the function that runs it, and hooks for planning and reports.

    A hook is called with the stage's params. If it needs more, the name of the stage comes before the params and the
    view of the recipe after them.
    """

    name: str
    params: type[StageParams]
    run: str
    """The function that runs the stage, as `module:function`; it is imported when a stage runs."""
    outputs: tuple[Output, ...] = ()
    inputs: Mapping[str, tuple[Output, ...]] = field(default_factory=dict)
    """Input role -> the outputs that can fill it; a role that is not listed accepts any stage."""
    version: int = 1
    """Part of the fingerprint; it is increased when the same inputs would give different outputs."""

    # Requirements.
    distributed: bool = False
    """Whether it runs on execution.parallel.world_size processes inside a Megatron session."""
    starts_ranks: bool = False
    """Whether it has a layout and starts its processes itself, because they run in another environment."""
    whole_layers: bool = False
    """Whether each of its processes works with whole layers, so that tp, pp and cp of its layout count as dp."""
    one_gpu: bool = False
    """Whether it has no layout but runs faster on a GPU."""
    needs_aligner: bool = False
    """Whether it runs in the environment of NeMo-Aligner."""
    whole_sequences: bool = False
    """Whether it needs whole sequences, which context parallelism would split."""
    skips_long_rows: bool = False
    """Whether it skips rows longer than max_seq_len_tokens, which may then exceed what its model supports."""
    loads_own_model: bool = False
    """Whether it also runs the model that it makes, not only those of its inputs."""
    reads_results: bool = False
    """Whether it reads only results and small files of its inputs, not their weights."""

    # Training and resuming.
    trains: bool = False
    """Whether it trains a model on text. The evaluations of that model are checked before such a stage starts."""
    stops_by_itself: bool = False
    """Whether its ranks write a checkpoint and exit when a stop is requested."""
    resumes_with_other_rates: bool = False
    """Whether it can resume from a checkpoint that was made with another learning rate or other intervals."""

    # Presentation.
    report: str | None = None
    """Section of the report that shows its results."""
    chat_rank: int | None = None
    """Preference of `minitron chat RUN`, which loads the finished model of the highest rank."""
    copied_to_run: str | None = None
    """Glob pattern of the files that are also copied into the run's folder."""

    # Hooks for planning.
    sources: Callable[[Any], Iterable[Source]] = _nothing
    functions: Callable[[Any], Iterable[str]] = _nothing
    """Functions of other packages that it calls, as `module:function`; the files of these modules are fingerprinted."""
    tasks: Callable[[Any], Iterable[TaskUse]] = _nothing
    text_use: Callable[[Any], TextUse | None] = _unknown
    heldout_uses: Callable[[Any], Iterable[HeldoutUse]] = _nothing
    expand: Callable[[str, Any, RecipeView], Mapping[str, StageParams] | None] = _unknown
    """The stages into which a search expands, itself included; None: the stage is not expanded."""
    used_inputs: Callable[[str, Any, Mapping[str, Any], RecipeView], Mapping[str, Any]] = _all_inputs
    """The inputs that the stage reads, out of those that the recipe names."""
    shape: Callable[[str, Any, RecipeView], ModelShape | None] = _unknown
    """Shape of the model that it makes; None if it is not known or the stage makes none."""
    planned_shape: Callable[[str, Any, RecipeView], ModelShape | None] = _unknown
    """For a stage that makes a prune plan: shape of the pruned model."""
    cuts_by: Callable[[Any], str | None] = _unknown
    """For a stage that prunes a model: the stage with the plan that it follows."""
    reduction: Callable[[str, Any, RecipeView], tuple[ModelShape | None, ModelShape | None] | None] = _unknown
    """For a stage that selects what to prune by importance: the shapes before and after pruning."""
    chat_rows: Callable[[str, Any, RecipeView], ChatRowFacts | None] = _unknown
    rated_rows: Callable[[Any], str | None] = _unknown
    """For a stage that rates chat rows: the stage that makes the rows."""
    points: Callable[[str, Any, RecipeView], Iterable[Mapping[str, Any]]] = _nothing
    """For a search: facts about each point of its grid."""
    problems: Callable[[str, Any, RecipeView], Iterable[str]] = _nothing
    """One line for each rule that the stage breaks on any machine."""
    load: Callable[[str, Any, Parallel, RecipeView], Load | None] = _unknown
    """Its computational load in a layout; None if sizes are not known or it does not run a model."""
    disk_bytes: Callable[[Any, Load], int | None] = _unknown
    """Size of its output; None: that of a model with its checkpoints for a training, 0 for other stages."""
    source_disk_bytes: Callable[[Path, int], int] | None = None
    """Disk space that a file of a source needs while the stage runs, from its path and size in bytes; None: none."""
    part_of: Callable[[str, Any], str | None] = _unknown
    """Stage of the recipe that a stage belongs to that the planner has written; None: it is in the recipe itself. The
    layout and resources of that stage are its own unless it has others."""
    array: Callable[[str, Any], str | None] = _unknown
    """Name of the job array that it shares with other stages of its kind; None: it has its own job."""
    num_servers: Callable[[Any], int] = lambda _params: 0
    """Number of servers that its processes call and that can have nodes of their own."""
    result_tokens: Callable[[Result], int | None] = _num_tokens
    """Number of tokens that a finished stage has processed."""
    preflight: str | None = None
    """A function, as `module:function`, that runs before a training and finds problems that would stop this stage after
    it. It is called as function(name, params, training, stages, store, assets_dir) and raises DataError."""

    @property
    def has_layout(self) -> bool:
        """Whether it can run on several processes."""
        return self.distributed or self.starts_ranks

    @property
    def has_parts(self) -> bool:
        """Whether the planner writes further stages for it."""
        return self.expand is not _unknown

    @property
    def uses_gpu(self) -> bool:
        return self.has_layout or self.one_gpu

    def load_function(self) -> StageFunction:
        """Import the function that runs the stage."""
        return load_function(self.run)


def load_function(entry: str) -> Any:
    """Import a function from its name `module:function`."""
    module, function = entry.split(":")
    return getattr(import_module(module), function)
