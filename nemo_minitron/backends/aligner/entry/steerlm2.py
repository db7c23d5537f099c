"""SteerLM 2.0: several answers to each prompt, weighted by how well they fit the attributes asked for."""

from __future__ import annotations

from typing import Any

from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.data.nlp.builders import build_dataloader
from nemo_aligner.data.nlp.datasets import SteerLM2Dataset
from nemo_aligner.models.nlp.gpt.gpt_steerlm_model import GPTSteerLMModel
from omegaconf import DictConfig
from task import Task
from training import Loaders
from training import train as train_with


def train(task: Task) -> dict[str, Any]:
    """Rows are {"system", "prompt_turns", "label", "responses"} in NeMo-Aligner's own form: docs/ALIGNMENT.md."""
    return train_with(task, "sft", GPTSteerLMModel, _loaders, SupervisedTrainer)


def _loaders(config: DictConfig, model: Any, consumed_samples: int) -> Loaders:
    parts = []
    for data, consumed, is_training in (
        (config.model.data.train_ds, consumed_samples, True),
        (config.model.data.validation_ds, 0, False),
    ):
        dataset = SteerLM2Dataset(
            file_path=data.file_path,
            tokenizer=model.tokenizer,
            max_seq_length=data.max_seq_length,
            min_seq_length=data.min_seq_length,
            add_bos=data.add_bos,
            add_eos=data.add_eos,
            add_sep=data.add_sep,
            sep_id=0,
            seed=config.model.seed,
            label_key=data.label_key,
            truncation_field=data.truncation_field,
            pad_to_max_length=data.pad_to_max_length,
            index_mapping_dir=data.index_mapping_dir,
            prompt_template=data.prompt_template,
            memmap_workers=data.memmap_workers,
            hf_dataset=data.hf_dataset,
            truncation_method=data.truncation_method,
            special_tokens=config.model.data.chat_prompt_tokens,
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
