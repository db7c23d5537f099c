"""Every key of a recipe, with its default. Defaults stand here and nowhere else.

A recipe has three parts: its ``name``, its ``stages`` (what is computed; enters the
fingerprints) and ``execution`` (where and how; never enters a fingerprint).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nemo_minitron.config.schema.aligner import (
    Alignment,
    AnnotateStage,
    AttributeModelStage,
    DistillOfflineStage,
    DpoStage,
    SftStage,
    SteerlmSftStage,
)
from nemo_minitron.config.schema.alignment import (
    AttributeName,
    ChatDataStage,
    ChatFormat,
    ChatRendering,
    ChatSource,
    RowKind,
    TemplateName,
)
from nemo_minitron.config.schema.base import (
    Fraction,
    Inputless,
    LayerMetric,
    Precision,
    Schema,
    StageName,
    WidthMethod,
)
from nemo_minitron.config.schema.chat_evaluation import EvaluateChatInputs, EvaluateChatStage
from nemo_minitron.config.schema.cluster import Cluster, Container, Mount, Resources
from nemo_minitron.config.schema.execution import (
    Execution,
    Parallel,
)
from nemo_minitron.config.schema.init import InitInputs, InitStage, NewTokenizer
from nemo_minitron.config.schema.losses import HiddenLoss, LogitsLoss, Loss, Sampled, TopK
from nemo_minitron.config.schema.measuring import (
    CheckTeacherInputs,
    CheckTeacherStage,
    EvaluateInputs,
    EvaluateStage,
    ExportInputs,
    ExportStage,
    ReportInputs,
    ReportStage,
    SpeedInputs,
    SpeedMeasurement,
    SpeedStage,
)
from nemo_minitron.config.schema.pruning import (
    DepthTask,
    PruneInputs,
    PruneStage,
    ScoreInputs,
    ScoreStage,
    SelectInputs,
    SelectionRules,
    SelectStage,
    Target,
)
from nemo_minitron.config.schema.search import (
    CandidateInputs,
    CandidateStage,
    Hardware,
    Rung,
    SearchConstraints,
    SearchGrid,
    SearchInputs,
    SearchStage,
)
from nemo_minitron.config.schema.sources import (
    AdoptStage,
    DataSource,
    ImportStage,
    TokenizeInputs,
    TokenizeStage,
)
from nemo_minitron.config.schema.training import (
    CacheTeacherInputs,
    CacheTeacherStage,
    CorrectStage,
    DistillInputs,
    DistillStage,
    LearningRate,
    LossGuard,
    Optimization,
    TeacherCorrection,
    Training,
    TrainInputs,
    TrainStage,
)

StageConfig = Annotated[
    ImportStage
    | AdoptStage
    | InitStage
    | TokenizeStage
    | ChatDataStage
    | CheckTeacherStage
    | ScoreStage
    | SelectStage
    | PruneStage
    | DistillStage
    | TrainStage
    | CorrectStage
    | CacheTeacherStage
    | SearchStage
    | CandidateStage
    | EvaluateStage
    | SpeedStage
    | ExportStage
    | ReportStage
    | SftStage
    | SteerlmSftStage
    | DpoStage
    | DistillOfflineStage
    | AttributeModelStage
    | AnnotateStage
    | EvaluateChatStage,
    Field(discriminator="kind"),
]


class Recipe(Schema):
    """One complete, named run."""

    name: Annotated[str, Field(pattern=r"^[^\W_][\w.-]*(/[^\W_][\w.-]*)*$")]
    """Folder under run_root; the recipe file's path below recipes/ unless given."""
    stages: Annotated[dict[StageName, StageConfig], Field(min_length=1)]
    execution: Execution = Execution()


__all__ = [
    "AdoptStage",
    "Alignment",
    "AnnotateStage",
    "AttributeModelStage",
    "AttributeName",
    "CacheTeacherInputs",
    "CacheTeacherStage",
    "CandidateInputs",
    "CandidateStage",
    "ChatDataStage",
    "ChatFormat",
    "ChatRendering",
    "ChatSource",
    "CheckTeacherInputs",
    "CheckTeacherStage",
    "Cluster",
    "Container",
    "CorrectStage",
    "DataSource",
    "DepthTask",
    "DistillInputs",
    "DistillOfflineStage",
    "DistillStage",
    "DpoStage",
    "EvaluateChatInputs",
    "EvaluateChatStage",
    "EvaluateInputs",
    "EvaluateStage",
    "Execution",
    "ExportInputs",
    "ExportStage",
    "Fraction",
    "Hardware",
    "HiddenLoss",
    "ImportStage",
    "InitInputs",
    "InitStage",
    "Inputless",
    "LayerMetric",
    "LearningRate",
    "LogitsLoss",
    "Loss",
    "LossGuard",
    "Mount",
    "NewTokenizer",
    "Optimization",
    "Parallel",
    "Precision",
    "PruneInputs",
    "PruneStage",
    "Recipe",
    "ReportInputs",
    "ReportStage",
    "Resources",
    "RowKind",
    "Rung",
    "Sampled",
    "Schema",
    "ScoreInputs",
    "ScoreStage",
    "SearchConstraints",
    "SearchGrid",
    "SearchInputs",
    "SearchStage",
    "SelectInputs",
    "SelectStage",
    "SelectionRules",
    "SftStage",
    "SpeedInputs",
    "SpeedMeasurement",
    "SpeedStage",
    "StageConfig",
    "StageName",
    "SteerlmSftStage",
    "Target",
    "TeacherCorrection",
    "TemplateName",
    "TokenizeInputs",
    "TokenizeStage",
    "TopK",
    "TrainInputs",
    "TrainStage",
    "Training",
    "WidthMethod",
]
