"""Offline distillation: cache a teacher's top logits of every token in files, and train a student on them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.modules.common.megatron.utils import get_ltor_masks_and_position_ids
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.data.nlp.builders import (
    ChunkedJsonl,
    build_train_valid_test_knowledge_distillation_datasets,
)
from nemo_aligner.models.nlp.gpt.megatron_gpt_knowledge_distillation import GPTKnowledgeDistillationModel
from nemo_aligner.utils.distributed import compute_topk_logits_in_batched_sequence
from nemo_aligner.utils.train_script_utils import init_distributed
from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo
from omegaconf import DictConfig, OmegaConf, open_dict
from rendered_rows import rows_dataset
from task import STOP_FILE, Task, is_main, report_progress
from training import Loaders, StopTimer, batch_loaders, jsonl_arguments
from training import train as train_with

SEQ_MULTIPLE = 16
"""Sequences are padded to a multiple of this, so that they can be split over tensor-parallel ranks."""
PADDING = {"tokens": None, "labels": None, "topk_token_ids": None, "loss_mask": 0, "topk_logits": 0.0}
"""Key of a batch -> padding value; None: the end-of-text token."""


def topk_logits(task: Task) -> dict[str, Any]:
    """Write the `top_k` largest logits of every token, with `rows_per_file` rows in each file.

    Rows are {"input", "output"}; rows that do not fill a file are dropped. Existing files are kept.
    """
    config = OmegaConf.create(dict(task["config"]))
    config.model = load_and_override_model_config(task["nemo"], config.model)
    with open_dict(config):
        config.model.precision = config.trainer.precision
        config.model.optim = {"name": "adamw", "lr": 1e-5}  # required to build the model, but not used
    trainer = MegatronTrainerBuilder(config).create_trainer()
    model = load_from_nemo(MegatronGPTModel, config.model, trainer, strict=True, restore_path=task["nemo"])
    init_distributed(trainer, model, config.model.get("transformer_engine", False))
    model.eval()
    dataset = rows_dataset(config.data.data, model.tokenizer)
    stop, each = StopTimer(Path(task["work_dir"]) / STOP_FILE), int(task["rows_per_file"])
    num_files = len(dataset) // each
    for number in range(num_files):
        if stop.is_finished():
            return {"finished": False, "step": number}
        file = Path(config.output_path.replace(ChunkedJsonl.CHUNK_ID_STRING, str(number)))
        if not file.is_file():
            rows = _teacher_rows(model, dataset, range(number * each, (number + 1) * each), config)
            _write(file, rows)
        report_progress(task, number + 1, num_files)
    return {"finished": True, "num_files": num_files, "num_rows": num_files * each}


def train(task: Task) -> dict[str, Any]:
    """Train a student on the files of `topk_logits`."""
    return train_with(task, "knowledge_distillation", GPTKnowledgeDistillationModel, _loaders, SupervisedTrainer)


@torch.no_grad()
def _teacher_rows(model: Any, dataset: Any, indices: range, config: DictConfig) -> list[dict[str, Any]]:
    """Return the rows as tokens with the teacher's logits; all ranks must call this."""
    micro, dp = config.model.micro_batch_size, parallel_state.get_data_parallel_world_size()
    items = [dataset[index] for index in indices]
    items += items[-1:] * (-len(items) % (micro * dp))  # every rank needs the same number
    batch = dataset.collate_fn(items)
    share = len(items) // dp
    own = slice(parallel_state.get_data_parallel_rank() * share, (parallel_state.get_data_parallel_rank() + 1) * share)
    device = torch.cuda.current_device()
    logits, ids, log_sum = compute_topk_logits_in_batched_sequence(
        model.model,
        batch["tokens"][own].to(device),
        batch["position_ids"][own].to(device),
        batch["attention_mask"][own].to(device),
        config.top_k,
        config.trainer.precision,
        forward_micro_batch_size=micro,
    )
    columns = {key: batch[key] for key in ("tokens", "labels", "loss_mask")}
    columns |= {"topk_logits": logits.float().cpu(), "topk_token_ids": ids.cpu(), "log_sum_exp_logits": log_sum.cpu()}
    return [
        {key: column[row, : items[row]["token_count"] - 1].tolist() for key, column in columns.items()}
        for row in range(len(indices))
    ]


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    if is_main():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial_file = file.with_suffix(".partial")
        partial_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial_file.replace(file)
    torch.distributed.barrier()


def _loaders(config: DictConfig, model: Any, consumed_samples: int) -> Loaders:
    data = config.model.data
    train_dataset, valid_dataset, _ = build_train_valid_test_knowledge_distillation_datasets(
        **jsonl_arguments(config, model), n_chunks=data.n_chunks, n_examples_per_chunk=data.n_examples_per_chunk
    )
    collate = partial(_collate, eos_id=model.tokenizer.eos_id, data=data)
    return batch_loaders(config, train_dataset, valid_dataset, consumed_samples, collate)


def _collate(rows: list[dict[str, torch.Tensor]], eos_id: int, data: DictConfig) -> dict[str, torch.Tensor]:
    """Pad rows of shape [S] or [S, K] and stack them to [B, S] or [B, S, K]."""
    longest = max(len(row["tokens"]) for row in rows)
    seq = -(-longest // SEQ_MULTIPLE) * SEQ_MULTIPLE
    batch = {}
    for key, filler in PADDING.items():
        shape = (len(rows), seq, *rows[0][key].shape[1:])
        batch[key] = torch.full(shape, eos_id if filler is None else filler, dtype=rows[0][key].dtype)
        for row, out in zip(rows, batch[key], strict=True):
            out[: len(row[key])] = row[key]
    mask, _, positions = get_ltor_masks_and_position_ids(
        batch["tokens"], eos_id, data.reset_position_ids, data.reset_attention_mask, data.eod_mask_loss
    )
    # The model uses the first mask only, but a batch is split into micro-batches by rows.
    mask = mask.repeat(len(rows), 1, 1, 1) if len(mask) == 1 else mask
    return {**batch, "attention_mask": mask, "position_ids": positions}
