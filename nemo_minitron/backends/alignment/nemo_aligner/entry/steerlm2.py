"""SteerLM 2.0: several answers to each prompt, weighted by how well they match the requested attributes."""

from __future__ import annotations

from typing import Any

from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer
from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.data.nlp.datasets import SteerLM2Dataset
from nemo_aligner.models.nlp.gpt.gpt_steerlm_model import GPTSteerLMModel
from omegaconf import DictConfig
from safetensors.torch import save_file
from task import Task
from training import Loaders, prepare, sft_loaders
from training import train as train_with


class RenderedDataset(SteerLM2Dataset):  # type: ignore[misc]
    """SteerLM2Dataset whose rows have the rendered texts, so that any chat template can be used.

    Tokens, masks and weights are those of NeMo-Aligner, which gets an empty text for each marker that it would add.
    """

    def _process_example(self, example: dict[str, Any]) -> dict[str, Any]:
        responses = [{**response, "from": "", "value": response["output"]} for response in example["responses"]]
        rendered = {"system": example["prompt"], "prompt_turns": [{}], "label": None, "responses": responses}
        processed: dict[str, Any] = super()._process_example(rendered)
        return processed

    def get_prompt(self, system_turn: str, prompt_turns: list[dict[str, str]]) -> str:
        """Return the rendered prompt."""
        return system_turn


def train(task: Task) -> dict[str, Any]:
    """Train SteerLM 2.0. docs/explanation/alignment.md describes the rows."""
    return train_with(task, "sft", GPTSteerLMModel, _loaders, SupervisedTrainer)


def batch(task: Task) -> dict[str, Any]:
    """Write to `out` the tensors that NeMo-Aligner's dataset makes of the first batch of rows, in the file's order."""
    config, _ = prepare(task, "sft")
    settings = config.model.tokenizer
    tokenizer = get_nmt_tokenizer(library=settings.library, model_name=settings.type, use_fast=settings.use_fast)
    data = config.model.data.train_ds
    dataset = _dataset(config, data, tokenizer)
    tensors = dataset.collate_fn([dataset[row] for row in range(data.global_batch_size)])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, task["out"])
    return {}


def _loaders(config: DictConfig, model: Any, consumed_samples: int) -> Loaders:
    return sft_loaders(config, consumed_samples, lambda data: _dataset(config, data, model.tokenizer))


def _dataset(config: DictConfig, data: DictConfig, tokenizer: Any) -> SteerLM2Dataset:
    markers = config.model.data.chat_prompt_tokens
    renders = config.model.data.chat
    return (SteerLM2Dataset if renders else RenderedDataset)(
        file_path=data.file_path,
        tokenizer=tokenizer,
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
        special_tokens=markers if renders else dict.fromkeys(markers, ""),
    )
