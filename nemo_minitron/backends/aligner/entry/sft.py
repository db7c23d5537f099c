"""Supervised fine-tuning: next-token loss on the answers."""

from __future__ import annotations

from typing import Any

from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.data.nlp.builders import build_dataloader, build_sft_dataset
from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
from omegaconf import DictConfig
from task import Task
from training import Loaders
from training import train as train_with


def train(task: Task) -> dict[str, Any]:
    """Rows are {"input", "output"}, already in the words of the chat template."""
    return train_with(task, "sft", GPTSFTModel, _loaders, SupervisedTrainer)


def _loaders(config: DictConfig, model: Any, consumed_samples: int) -> Loaders:
    parts = []
    for data, consumed, is_training in (
        (config.model.data.train_ds, consumed_samples, True),
        (config.model.data.validation_ds, 0, False),
    ):
        dataset = build_sft_dataset(
            data, model.tokenizer, None, answer_only_loss=True, is_chat=config.model.data.chat, model_cfg=config.model
        )
        loader = build_dataloader(
            cfg=config,
            dataset=dataset,
            consumed_samples=consumed,
            mbs=data.micro_batch_size,
            gbs=data.global_batch_size,
            collate_fn=dataset.collate_fn,
            drop_last=data.drop_last,
            pad_samples_to_global_batch_size=not data.drop_last,
            load_gbs=True,
            use_random_sampler=is_training,
        )
        parts.append((dataset, loader))
    return parts[0][0], parts[0][1], parts[1][1]
