"""Supervised fine-tuning: next-token loss on the answers."""

from __future__ import annotations

from typing import Any

from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
from omegaconf import DictConfig
from rendered_rows import rows_dataset
from task import Task
from training import Loaders, sft_loaders
from training import train as train_with


def train(task: Task) -> dict[str, Any]:
    """Train on rows {"input", "output"}, rendered with the chat template."""
    return train_with(task, "sft", GPTSFTModel, _loaders, SupervisedTrainer)


def _loaders(config: DictConfig, model: Any, consumed_samples: int) -> Loaders:
    def dataset(data: DictConfig) -> Any:
        return rows_dataset(data, model.tokenizer, is_chat=config.model.data.chat, model_config=config.model)

    return sft_loaders(config, consumed_samples, dataset)
