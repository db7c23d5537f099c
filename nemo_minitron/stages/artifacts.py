"""What stages publish and other stages read, with typed facts. Importing this is cheap: no torch."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.families import ModelShape, read_shape
from nemo_minitron.schema.base import TEMPLATE_DATE
from nemo_minitron.schema.chats import RowKind, TemplateName

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.pruning.plan_file import PrunePlan

SCORES_FILE, METRICS_FILE = "scores.safetensors", "metrics.json"


class Model(Artifact):
    """A Hugging Face model folder."""

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model, read from its config.json."""
        from nemo_minitron.hf.checkpoint import read_config

        return read_shape(read_config(self.path))

    @property
    def license(self) -> str | None:
        """SPDX id, as far as it is known."""
        return self.result.get("license")

    @property
    def source(self) -> str | None:
        """Where an imported model came from."""
        return self.result.get("source")


class Scores(Artifact):
    """Importance of every axis."""

    def load(self) -> dict[str, Tensor]:
        """Axis -> scores."""
        from safetensors.torch import load_file

        return load_file(str(self.path / SCORES_FILE))

    @staticmethod
    def save(scores: dict[str, Tensor], folder: Path) -> None:
        """Write the scores into a stage's folder."""
        from safetensors.torch import save_file

        save_file(scores, str(folder / SCORES_FILE))


class PrunePlanArtifact(Artifact):
    """Which indices stay on each axis."""

    def load(self, source: ModelShape) -> PrunePlan:
        """The indices that stay, checked against the shape of the model that is cut.

        Raises:
            ArtifactError: the plan does not fit the model.
        """
        from nemo_minitron.pruning.plan_file import read_plan

        return read_plan(self.path, source)


class TokenizedText(Artifact):
    """Indexed datasets of Megatron."""

    @property
    def sources(self) -> list[Any]:
        """Where the text came from."""
        return list(self.result.get("sources", ()))

    @property
    def tokenizer_identity(self) -> str | None:
        """Checksums of the tokenizer that made the tokens; runs of older versions do not have them."""
        found = self.result.get("tokenizer_sha256")
        return None if found is None else str(found)


class ChatRows(Artifact):
    """Chat rows, split into train.jsonl and valid.jsonl."""

    @property
    def rows(self) -> RowKind:
        """Whether a row is a conversation or a pair of answers."""
        return cast(RowKind, self.result["rows"])

    def file(self, part: str) -> Path:
        """The rows of `train` or `valid`."""
        return self.path / f"{part}.jsonl"


class RewardModel(Artifact):
    """A trained reward model."""

    @property
    def reward(self) -> str:
        """regression or ranking."""
        return str(self.result["reward"])

    @property
    def template(self) -> TemplateName:
        """Chat template of the texts that it was trained on."""
        return cast(TemplateName, self.result["template"])

    @property
    def whole_markers(self) -> bool:
        """Whether the template's markers had to be single tokens."""
        return bool(self.result["whole_markers"])

    @property
    def template_date(self) -> date:
        """The day that the template wrote into the texts; manifests of older versions do not have it."""
        return date.fromisoformat(self.result.get("template_date", TEMPLATE_DATE.isoformat()))


class TeacherCheck(Artifact):
    """A teacher that has passed its check."""


class TeacherCache(Artifact):
    """A part of a teacher's distributions."""


class SearchResult(Artifact):
    """The ranking of a search."""


class CandidateModel(Model):
    """A trained candidate of a search."""

    @property
    def candidate(self) -> str:
        """Name of the point of the grid."""
        return str(self.result["candidate"])

    @property
    def losses(self) -> list[float | None]:
        """Held-out loss after each rung, in nats per token; None where it was too slow to be trained."""
        return list(self.result["losses"])


class Evaluation(Artifact):
    """Measures of one model."""

    def metrics(self) -> dict[str, Any]:
        """Content of metrics.json."""
        return dict(json.loads((self.path / METRICS_FILE).read_text(encoding="utf-8")))
