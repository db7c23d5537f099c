"""Every key of a recipe, with its default. Defaults stand here and nowhere else.

A recipe has three parts: its ``name``, its ``stages`` (what is computed; enters the
fingerprints) and ``execution`` (where and how; never enters a fingerprint).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class Schema(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["fp32", "bf16"]
StageName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Inputless(Schema):
    """A stage that reads no other stage."""


# --- import -----------------------------------------------------------------------------------


class ImportStage(Schema):
    """Bring a Hugging Face model (folder, hub name or GGUF file) into the run."""

    kind: Literal["import"]
    inputs: Inputless = Inputless()
    source: str
    """`asset:NAME`, `hf:ORG/NAME`, a folder with config.json, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    license: str | None = None
    """SPDX id carried into the exported model card; read from the source when None."""
    architecture: dict[str, Any] | None = None
    """Expected keys of config.json. Lets `plan` count parameters before the download, and is checked at import."""


# --- data -------------------------------------------------------------------------------------


class DataSource(Schema):
    """One file, glob or folder of documents."""

    source: str
    """`asset:NAME`, or a path or glob of .txt, .jsonl, .parquet, each also as .gz or .zst."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Share of training samples drawn from this source, relative to the other sources."""
    text_field: str = "text"
    """Column of jsonl and parquet rows."""
    document_separator: Annotated[str, Field(min_length=1)] | None = None
    """Splits .txt files into documents; None: one document a file."""
    max_documents: PositiveInt | None = None


class TokenizeInputs(Schema):
    tokenizer: StageName = "teacher"


class TokenizeStage(Schema):
    """Text -> Megatron indexed datasets, split into train and validation by document."""

    kind: Literal["tokenize"]
    inputs: TokenizeInputs = TokenizeInputs()
    sources: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    valid_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Share of the documents of each source that is held out."""
    seed: int = 1234


# --- teacher check ----------------------------------------------------------------------------


class CheckTeacherInputs(Schema):
    teacher: StageName = "teacher"
    data: StageName = "data"


class CheckTeacherStage(Schema):
    """Held-out loss of the teacher; a teacher above the bound stops the run before it costs anything."""

    kind: Literal["check_teacher"]
    inputs: CheckTeacherInputs = CheckTeacherInputs()
    max_loss: Annotated[float, Field(gt=0.0)]
    """Nats per token on the validation split."""
    num_tokens: PositiveInt = 16384
    seq_len_tokens: PositiveInt = 512
    precision: Precision = "bf16"


# --- score, select, prune ---------------------------------------------------------------------


class ScoreInputs(Schema):
    model: StageName = "teacher"
    data: StageName = "data"


class ScoreStage(Schema):
    """Activation-based importance of every axis, forward passes only (2407.14679, section 2.2)."""

    kind: Literal["score"]
    inputs: ScoreInputs = ScoreInputs()
    num_samples: PositiveInt = 1024
    """Calibration samples (2407.14679 section 2.2)."""
    seq_len_tokens: PositiveInt = 512
    width_axes: tuple[Literal["hidden", "ffn", "heads"], ...] = ("hidden", "ffn", "heads")
    layer_metrics: tuple[Literal["block_influence", "lm_loss"], ...] = ("block_influence",)
    lm_loss_samples: PositiveInt = 16
    """Samples for the loss after removing each layer (one pass per layer)."""
    batch_aggregation: Literal["l2", "mean", "var"] = "l2"
    sequence_aggregation: Literal["mean", "l2", "var"] = "mean"
    precision: Precision = "bf16"
    seed: int = 1234


class Target(Schema):
    """Sizes of the student; None keeps the teacher's."""

    num_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    ffn_hidden_size: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None


class SelectInputs(Schema):
    model: StageName = "teacher"
    scores: StageName | None = "score"
    """Not needed for `method: random`."""


class SelectStage(Schema):
    """Scores + target sizes -> prune_plan.json: which indices stay on each axis."""

    kind: Literal["select"]
    inputs: SelectInputs = SelectInputs()
    target: Target
    method: Literal["importance", "random"] = "importance"
    layer_metric: Literal["block_influence", "lm_loss"] = "block_influence"
    drop_contiguous_layers: bool = False
    """Drop one run of neighbouring layers instead of the individually least important ones (2408.11796, section 4)."""
    drop_layers: tuple[int, ...] | None = None
    """Exact 0-based layers to drop, instead of choosing by score."""
    seed: int = 1234


class PruneInputs(Schema):
    model: StageName = "teacher"
    plan: StageName = "select"


class PruneStage(Schema):
    """Cut the model by plan: Hugging Face checkpoint in, Hugging Face checkpoint out."""

    kind: Literal["prune"]
    inputs: PruneInputs = PruneInputs()


# --- distill ----------------------------------------------------------------------------------


class ForwardKL(Schema):
    """KL(teacher || student) on next-token logits (2407.14679, section 3)."""

    kind: Literal["forward_kl"] = "forward_kl"
    temperature: Annotated[float, Field(gt=0.0)] = 1.0


class DistillInputs(Schema):
    student: StageName = "prune"
    teacher: StageName = "teacher"
    data: StageName = "data"
    check: StageName | None = "check_teacher"
    """Waits for this teacher check to pass; null: no check."""


class DistillStage(Schema):
    """Train the student to match the live teacher."""

    kind: Literal["distill"]
    inputs: DistillInputs = DistillInputs()
    loss: ForwardKL = ForwardKL()
    num_steps: PositiveInt
    global_batch_size: PositiveInt
    """Sequences per optimizer step."""
    seq_len_tokens: PositiveInt
    lr: Annotated[float, Field(gt=0.0)]
    """Peak; reached after the warm-up."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """End of the cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    clip_grad: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    precision: Precision = "bf16"
    valid_interval_steps: PositiveInt = 100
    valid_num_tokens: PositiveInt = 16384
    save_interval_steps: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    """Newest training checkpoints kept in the work folder."""
    seed: int = 1234


# --- evaluate, measure, export, report --------------------------------------------------------


class EvaluateInputs(Schema):
    model: StageName
    data: StageName = "data"


class EvaluateStage(Schema):
    """Held-out loss and bits per byte, lm-eval tasks, and sample texts of one model."""

    kind: Literal["evaluate"]
    inputs: EvaluateInputs
    label: str
    """Column of the report: teacher, pruned, random, distilled."""
    num_tokens: PositiveInt = 32768
    """Held-out tokens for loss and bits per byte."""
    seq_len_tokens: PositiveInt = 512
    tasks: tuple[str, ...] = ()
    """lm-eval task names."""
    tasks_source: str | None = None
    """`asset:NAME` with offline copies of the task data; null: lm-eval's own (needs the hub)."""
    tasks_limit: PositiveInt | None = None
    """Examples per task; null: all."""
    prompts: tuple[str, ...] = ()
    """Continued greedily for the report."""
    max_new_tokens: PositiveInt = 48
    precision: Precision = "bf16"


class SpeedInputs(Schema):
    models: Annotated[dict[str, StageName], Field(min_length=1)]
    """Label -> stage. All are timed in one process, interleaved."""


class SpeedStage(Schema):
    """Prefill and generation speed of several models, side by side."""

    kind: Literal["speed"]
    inputs: SpeedInputs
    prompt_tokens: PositiveInt = 128
    new_tokens: PositiveInt = 32
    rounds: PositiveInt = 3
    precision: Precision = "bf16"


class ExportInputs(Schema):
    model: StageName = "distill"
    teacher: StageName = "teacher"
    evaluations: tuple[StageName, ...] = ()


class ExportStage(Schema):
    """The finished model as plain `transformers` loads it, with a model card."""

    kind: Literal["export"]
    inputs: ExportInputs = ExportInputs()
    dtype: Literal["keep", "float32", "bfloat16"] = "bfloat16"
    model_name: str | None = None
    """Title of the model card; the recipe's name when None."""


class ReportInputs(Schema):
    stages: tuple[StageName, ...] | None = None
    """Stages that the report tells of; None: every other stage of the recipe."""


class ReportStage(Schema):
    """report.json, report.md and one self-contained report.html."""

    kind: Literal["report"]
    inputs: ReportInputs = ReportInputs()
    title: str | None = None


class AdoptStage(Schema):
    """Use an existing Hugging Face folder as the output of this stage; it is not copied."""

    kind: Literal["adopt"]
    inputs: Inputless = Inputless()
    path: str
    sha256: str | None = None
    """Of model.safetensors (or its index); checked when given."""


StageConfig = Annotated[
    ImportStage
    | AdoptStage
    | TokenizeStage
    | CheckTeacherStage
    | ScoreStage
    | SelectStage
    | PruneStage
    | DistillStage
    | EvaluateStage
    | SpeedStage
    | ExportStage
    | ReportStage,
    Field(discriminator="kind"),
]


# --- execution --------------------------------------------------------------------------------


class Parallel(Schema):
    """Megatron's parallel layout. The number of processes is tp * pp * dp."""

    tp: PositiveInt = 1
    pp: PositiveInt = 1
    dp: PositiveInt = 1
    sequence_parallel: bool = False
    micro_batch_size: PositiveInt = 1
    """Sequences per forward pass and data-parallel rank."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


class Execution(Schema):
    """Where and how; two runs that differ only here give the same artifacts."""

    run_root: str = "runs"
    assets_dir: str = "assets"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = None
    """CPU threads of each process; None: cores divided by processes."""
    workers: PositiveInt | None = None
    """Processes for tokenization; None: all cores."""
    parallel: Parallel = Parallel()
    parallel_by_stage: dict[StageName, Parallel] = Field(default_factory=dict)


class Recipe(Schema):
    """One complete, named run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*$")]
    """Folder under run_root; the recipe file's path below recipes/ unless given."""
    stages: Annotated[dict[StageName, StageConfig], Field(min_length=1)]
    execution: Execution = Execution()
