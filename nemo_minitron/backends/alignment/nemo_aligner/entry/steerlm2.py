"""SteerLM 2.0: several answers to each prompt, weighted by how well they match the requested attributes."""

from __future__ import annotations

from typing import Any

from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.data.nlp.datasets import SteerLM2Dataset
from nemo_aligner.models.nlp.gpt.gpt_steerlm_model import GPTSteerLMModel
from omegaconf import DictConfig
from task import Task
from training import Loaders, sft_loaders
from training import train as train_with


def train(task: Task) -> dict[str, Any]:
    """Train SteerLM 2.0. docs/explanation/alignment.md describes the rows: system, prompt_turns, label, responses."""
    return train_with(task, "sft", GPTSteerLMModel, _loaders, SupervisedTrainer)


def _loaders(config: DictConfig, model: Any, consumed_samples: int) -> Loaders:
    def dataset(data: DictConfig) -> Any:
        return SteerLM2Dataset(
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

    return sft_loaders(config, consumed_samples, dataset)
