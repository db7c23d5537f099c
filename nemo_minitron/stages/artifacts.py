"""Types of the artifacts that stages publish and other stages read. Importing this module loads no torch."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.errors import ArtifactError, error_context
from nemo_minitron.families import ModelShape, read_shape
from nemo_minitron.schema.base import TEMPLATE_DATE
from nemo_minitron.schema.chats import RowKind, TemplateName
from nemo_minitron.schema.pruning import Target

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.pruning.plan_file import PrunePlan

SCORES_FILE, METRICS_FILE = "scores.safetensors", "metrics.json"


def how_to_remake(stage: str) -> str:
    """Return the next step for an error in the output of a stage."""
    return f"To make it again: --rerun {stage}."


class Model(Artifact):
    """A Hugging Face model folder."""

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model, read from its config.json."""
        from nemo_minitron.hf.checkpoint import read_config

        return read_shape(read_config(self.path))

    @property
    def license(self) -> str | None:
        """SPDX id of the license; None if it is not known."""
        return self.result.get("license")

    @property
    def source(self) -> str | None:
        """Source of an imported model, as the recipe names it."""
        return self.result.get("source")


class Scores(Artifact):
    """Importance scores of every axis."""

    def load(self) -> dict[str, Tensor]:
        """Return axis -> scores."""
        from safetensors.torch import load_file

        return load_file(str(self.path / SCORES_FILE))

    @staticmethod
    def save(scores: dict[str, Tensor], folder: Path) -> None:
        """Write the scores into the folder of a stage."""
        from safetensors.torch import save_file

        save_file(scores, str(folder / SCORES_FILE))


class PrunePlanArtifact(Artifact):
    """The indices to keep on each axis."""

    def load(self, source: ModelShape) -> PrunePlan:
        """Read the plan and check it against the shape of the model to prune.

        Raises:
            ArtifactError: the plan does not fit the model.
        """
        from nemo_minitron.pruning.plan_file import read_plan

        with error_context(ArtifactError, next_step=how_to_remake(self.stage)):
            return read_plan(self.path, source)


class TokenizedText(Artifact):
    """Tokenized text as Megatron's indexed datasets."""

    @property
    def sources(self) -> list[Any]:
        """Sources of the text, as the recipe names them."""
        return list(self.result.get("sources", ()))

    @property
    def tokenizer_identity(self) -> str | None:
        """Checksums of the tokenizer that made the tokens; None for runs of older versions."""
        found = self.result.get("tokenizer_sha256")
        return None if found is None else str(found)


class ChatRows(Artifact):
    """Chat rows, split into train.jsonl and valid.jsonl."""

    @property
    def rows(self) -> RowKind:
        """Kind of the rows: conversations or pairs of answers."""
        return cast(RowKind, self.result["rows"])

    def file(self, part: str) -> Path:
        """Return the file with the rows of `train` or `valid`."""
        return self.path / f"{part}.jsonl"


class SampledAnswers(Artifact):
    """Prompts with several sampled answers and their log-probabilities, split into train.jsonl and valid.jsonl."""

    @property
    def answers_per_prompt(self) -> int:
        """Answers to each prompt."""
        return int(self.result["answers_per_prompt"])

    @property
    def max_seq_len_tokens(self) -> int:
        """Longest prompt and answer together."""
        return int(self.result["max_seq_len_tokens"])

    @property
    def template(self) -> TemplateName:
        """Chat template of the texts."""
        return cast(TemplateName, self.result["template"])

    def num_prompts(self, part: str) -> int:
        """Return the number of prompts of `train` or `valid`."""
        return int(self.result[part]["rows"])

    def lengths(self, part: str) -> dict[str, Any]:
        """Return the length statistics of `train` or `valid`."""
        return dict(self.result[part]["lengths"])

    def file(self, part: str) -> Path:
        """Return the file with the rows of `train` or `valid`."""
        return self.path / f"{part}.jsonl"


class RewardModel(Artifact):
    """A trained reward model."""

    @property
    def reward(self) -> str:
        """Training objective: regression or ranking."""
        return str(self.result["reward"])

    @property
    def template(self) -> TemplateName:
        """Chat template of the texts that the model was trained on."""
        return cast(TemplateName, self.result["template"])

    @property
    def whole_markers(self) -> bool:
        """Whether the template's markers had to be single tokens."""
        return bool(self.result["whole_markers"])

    @property
    def template_date(self) -> date:
        """Date that the template wrote into the texts; the default for manifests of older versions."""
        return date.fromisoformat(self.result.get("template_date", TEMPLATE_DATE.isoformat()))


class TeacherCheck(Artifact):
    """Result of a teacher check that has passed."""


class TeacherCache(Artifact):
    """Cached distributions of a teacher: drawn tokens, or the most likely ones, at each position."""


class SearchResult(Artifact):
    """The ranking of a search."""

    def winner(self) -> Target:
        """Return the sizes of the best candidate."""
        return winner_of(self.path, self.stage)


def winner_of(folder: Path, search: str) -> Target:
    """Return the sizes of the best candidate of a search.

    Args:
        search: the stage of the search, for messages.
    """
    from nemo_minitron.pruning.search import winner_of as best

    with error_context(ArtifactError, next_step=how_to_remake(search)):
        return best(folder)


class CandidateModel(Model):
    """A trained candidate of a search."""

    @property
    def candidate(self) -> str:
        """Name of the candidate's grid point."""
        return str(self.result["candidate"])

    @property
    def losses(self) -> list[float | None]:
        """Held-out loss after each rung, in nats per token; None if the candidate was too slow or diverged."""
        return list(self.result["losses"])


class Evaluation(Artifact):
    """Measured quality of one model."""

    def metrics(self) -> dict[str, Any]:
        """Read metrics.json."""
        return dict(json.loads((self.path / METRICS_FILE).read_text(encoding="utf-8")))
