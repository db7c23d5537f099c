"""NeMo-Aligner as an alignment backend. What needs torch is imported when it is used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.base import (
    AlignmentBackend,
    LossPoint,
    Method,
    Rollouts,
    TaskContext,
    Training,
)
from nemo_minitron.backends.alignment.nemo_aligner import config, model_config
from nemo_minitron.backends.alignment.nemo_aligner.environment import aligner_python
from nemo_minitron.backends.alignment.nemo_aligner.model_config import REWARD_DIR
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Parallel

TRAIN_LOSS, VALID_LOSS, VALID_LOSS_SE = "train/loss", "val/loss", "val/loss_se"
"""Names in the curves that entry/task.py writes."""
TRAIN_DISTANCE, VALID_DISTANCE = "train/distance", "val/distance"
"""The same for SteerLM 2.0, whose `loss` has the right gradient, but a value without a meaning."""


class NemoAligner(AlignmentBackend):
    """Implements `AlignmentBackend`; trainings run in NeMo-Aligner's own environment."""

    def is_installed(self) -> bool:
        try:
            aligner_python()
        except EnvironmentProblem:
            return False
        return True

    def override_problems(self, method: Method, overrides: Mapping[str, Any]) -> Iterator[str]:
        return config.override_problems(method, overrides)

    def model_problems(self, shape: ModelShape, layout: Parallel) -> Iterator[str]:
        reason = model_config.unknown_to_nemo(shape)
        if reason is not None:
            yield f"NeMo 2.1, on which NeMo-Aligner builds, does not support {reason}."
        if shape.num_layers % layout.pp:
            yield (
                "NeMo needs the same number of layers in every pipeline stage; "
                f"{shape.num_layers} layers, pp = {layout.pp}."
            )

    def train(self, training: Training, out_dir: Path, context: TaskContext) -> list[LossPoint]:
        from nemo_minitron.backends.alignment.nemo_aligner.training import train_language_model, train_reward_model

        is_reward_model = training.objective.method == "reward_model"
        curves = (
            train_reward_model(training, out_dir / REWARD_DIR, context)
            if is_reward_model
            else train_language_model(training, out_dir, context)
        )
        return self.read_curve(curves)

    def train_on_rewards(self, rollouts: Rollouts, out_dir: Path, context: TaskContext) -> list[dict[str, float]]:
        from nemo_minitron.backends.alignment.nemo_aligner.rollouts import train_on_rewards

        curves = train_on_rewards(rollouts, out_dir, context)
        return [json.loads(line) for line in curves.read_text(encoding="utf-8").splitlines()]

    def read_curve(self, file: Path) -> list[LossPoint]:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [
            LossPoint(
                row["step"],
                row.get(TRAIN_DISTANCE, row.get(TRAIN_LOSS)),
                row.get(VALID_DISTANCE, row.get(VALID_LOSS)),
                None if VALID_DISTANCE in row else row.get(VALID_LOSS_SE),
            )
            for row in rows
        ]

    def predict_rewards(
        self, reward_model_dir: Path, texts: Sequence[str], batch_size: int, context: TaskContext
    ) -> list[list[float]]:
        from nemo_minitron.backends.alignment.nemo_aligner.prediction import predict

        return predict(
            reward_model_dir / REWARD_DIR, self.reward_tokenizer(reward_model_dir), texts, batch_size, context
        )

    def reward_tokenizer(self, reward_model_dir: Path) -> Path:
        return model_config.tokenizer_dir(reward_model_dir / REWARD_DIR)
