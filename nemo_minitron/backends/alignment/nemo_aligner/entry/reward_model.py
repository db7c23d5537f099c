"""Reward models: a number for each attribute of an answer (regression), or one that ranks two answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from checkpoints import CONFIG_FILE, make_trainer, start_processes
from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.data.nlp.builders import (
    build_dataloader,
    build_train_valid_test_regression_rm_datasets,
    build_train_valid_test_rm_datasets,
)
from nemo_aligner.models.nlp.gpt.reward_model_classes import REWARD_MODEL_CLASS_DICT, RewardModelType
from nemo_aligner.utils.text_generation_utils import tokenize_batch
from nemo_aligner.utils.utils import load_from_nemo
from omegaconf import DictConfig, OmegaConf
from rule_server import REWARD_MODEL
from task import Task, report_progress
from training import Loaders, jsonl_arguments
from training import train as train_with

ONE_PROCESS = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "sequence_parallel": False}
"""Layout of a model that is only evaluated; a checkpoint's config has that of its training."""
DATASETS = {
    RewardModelType.BINARY_RANKING: build_train_valid_test_rm_datasets,
    RewardModelType.REGRESSION: build_train_valid_test_regression_rm_datasets,
}


def train(task: Task) -> dict[str, Any]:
    """Train on rows {"text", "label"} (regression), or two rows {"text"} for each pair, the better first (ranking)."""
    kind = RewardModelType(task["config"]["model"]["reward_model_type"])
    return train_with(
        task, "rm", REWARD_MODEL_CLASS_DICT[kind], _loaders, SupervisedTrainer, base_model_only=task["base_model_only"]
    )


def annotate(task: Task) -> dict[str, Any]:
    """Write to `out` the reward model's outputs for the `text` of every row; batches hold texts of similar length."""
    model = _loaded(task, {})
    texts = [json.loads(line)["text"] for line in Path(task["rows"]).read_text(encoding="utf-8").splitlines()]
    tokens = [torch.tensor(model.tokenizer.text_to_ids(text)) for text in texts]
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    found: dict[int, list[float]] = {}
    for start in range(0, len(order), task["batch_size"]):
        batch = order[start : start + task["batch_size"]]
        padded = torch.nn.utils.rnn.pad_sequence(
            [tokens[index] for index in batch], batch_first=True, padding_value=model.tokenizer.eos_id
        )
        model.forward_micro_batch_size = len(batch)
        rewards = model.infer((padded, torch.tensor([len(tokens[index]) for index in batch])))
        found.update(zip(batch, rewards.float().cpu().tolist(), strict=True))
        report_progress(task, len(found), len(order))
    Path(task["out"]).write_text("".join(json.dumps(found[index]) + "\n" for index in range(len(texts))))
    return {"num_rows": len(texts)}


def serve(task: Task) -> dict[str, Any]:
    """Serve the reward model by NeMo-Aligner's own server until the process ends.

    Its reward is the weighted sum of the model's outputs (`attribute_weights`; null: there is only one output).
    """
    import triton_socket

    triton_socket.prepare()
    triton_socket.announce(Path(task["work_dir"]) / task["ready_file"])
    from nemo_aligner.algorithms.reward_server import RewardModelServer

    regression = {"merge_attributes": True, "attribute_weights": task["attribute_weights"]}
    model = _loaded(task, {"regression": regression, "forward_micro_batch_size": task["batch_size"]})
    model.requires_grad_(False)  # the server converts rewards to numpy
    RewardModelServer(
        infer_fn=model.infer,
        tokenize_func=lambda sentences: tokenize_batch(sentences, model.tokenizer, model.cfg.encoder_seq_length),
        model_name=REWARD_MODEL,
        port=task["number"],
        inference_micro_batch_size=task["batch_size"],
        model_forward_micro_batch_size=task["batch_size"],
        strip_sequence_length_to_multiple=None,
    ).run_server()
    raise RuntimeError("Triton has ended")


def _loaded(task: Task, overrides: Mapping[str, Any]) -> Any:
    """Load the reward model for inference in this process.

    Args:
        overrides: nested keys for the model's config.
    """
    config = OmegaConf.load(Path(task["nemo"]) / CONFIG_FILE)
    # The checkpoint may have been moved, and the config has the old path of the tokenizer.
    config = OmegaConf.merge(config, {"tokenizer": {"type": task["tokenizer"]}}, ONE_PROCESS, overrides)
    trainer, config = make_trainer(OmegaConf.to_container(config))
    model_class = REWARD_MODEL_CLASS_DICT[RewardModelType(config.reward_model_type)]
    model = load_from_nemo(model_class, config, trainer, strict=True, restore_path=task["nemo"])
    start_processes(trainer)
    model.prepare_for_inference()
    return model


def _loaders(config: DictConfig, model: Any, consumed_samples: int) -> Loaders:
    kind = RewardModelType(config.model.reward_model_type)
    train_dataset, valid_dataset, _ = DATASETS[kind](**jsonl_arguments(config, model))
    drop_last = config.model.data.validation_drop_last
    options = {"cfg": config, "mbs": config.model.micro_batch_size, "gbs": config.model.global_batch_size}
    loader = build_dataloader(
        dataset=train_dataset,
        consumed_samples=consumed_samples,
        load_gbs=True,
        use_random_sampler=config.trainer.rm.train_random_sampler,
        **options,
    )
    valid_loader = build_dataloader(
        dataset=valid_dataset,
        consumed_samples=0,
        load_gbs=True,
        use_random_sampler=config.trainer.rm.val_random_sampler,
        drop_last=drop_last,
        pad_samples_to_global_batch_size=not drop_last,
        **options,
    )
    return train_dataset, loader, valid_loader
