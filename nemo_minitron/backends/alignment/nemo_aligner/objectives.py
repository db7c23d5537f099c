"""Config keys of each training objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.base import (
    AnswerWeightsObjective,
    PreferenceObjective,
    RewardObjective,
    SftObjective,
    TaskContext,
    TeacherObjective,
    Training,
)
from nemo_minitron.backends.alignment.nemo_aligner.fork_server import ForkServer
from nemo_minitron.backends.alignment.nemo_aligner.teacher_logits import cache_logits


def objective_keys(
    training: Training, nemo: Path, context: TaskContext, server: ForkServer | None = None
) -> dict[str, Any]:
    """Return dotted config key -> value. For a teacher objective, cache the teacher's logits first.

    Args:
        nemo: the NeMo checkpoint that the training starts from; it need not exist yet.
        server: see `run_task`.
    """
    objective, micro_batch_size = training.objective, context.layout.micro_batch_size
    match objective:
        case SftObjective():
            return _sft_keys(training, nemo, micro_batch_size)
        case PreferenceObjective():
            return {**_preference_keys(objective, micro_batch_size), **_json_rows(training, nemo)}
        case RewardObjective():
            return {**_reward_keys(objective, micro_batch_size), **_json_rows(training, nemo)}
        case TeacherObjective():
            return _teacher_keys(training, objective, nemo, context, server)
        case AnswerWeightsObjective():
            return _answer_weights_keys(training, nemo, micro_batch_size)


def _sft_keys(training: Training, nemo: Path, micro_batch_size: int) -> dict[str, Any]:
    keys: dict[str, Any] = {
        f"model.data.{part}.{key}": value
        for part, file in (("train_ds", training.train_rows), ("validation_ds", training.valid_rows))
        for key, value in {
            "file_path": str(file),
            "global_batch_size": training.global_batch_size,
            "micro_batch_size": micro_batch_size,
            "max_seq_length": training.max_seq_len_tokens,
        }.items()
    }
    return {**keys, "model.restore_from_path": str(nemo)}


def _answer_weights_keys(training: Training, nemo: Path, micro_batch_size: int) -> dict[str, Any]:
    """Return the keys of SteerLM 2.0, where a batch counts prompts and a micro-batch counts answers."""
    return {
        **_sft_keys(training, nemo, 1),
        "model.micro_batch_size": 1,
        "model.steerlm2.micro_batch_size": micro_batch_size,
        "model.steerlm2.forward_micro_batch_size": micro_batch_size,
    }


def _preference_keys(objective: PreferenceObjective, micro_batch_size: int) -> dict[str, Any]:
    return {
        "model.dpo.preference_loss": objective.loss,
        "model.dpo.ref_policy_kl_penalty": objective.beta,
        "model.dpo.gt_reward_scale": objective.reward_scale,
        "model.dpo.sft_loss_weight": objective.sft_loss_weight,
        "model.dpo.preference_average_log_probs": objective.average_log_probs,
        "model.dpo.sft_average_log_probs": objective.average_log_probs,
        "model.dpo.log_prob_forward_micro_batch_size": micro_batch_size,
    }


def _reward_keys(objective: RewardObjective, micro_batch_size: int) -> dict[str, Any]:
    return {
        "model.reward_model_type": "regression" if objective.reward == "regression" else "binary_ranking",
        "model.regression.num_attributes": objective.num_outputs,
        "model.share_embeddings_and_output_weights": False,  # a reward model has no output layer
        "model.forward_micro_batch_size": micro_batch_size,
    }


def _json_rows(training: Training, nemo: Path) -> dict[str, Any]:
    valid = [str(training.valid_rows)]
    return {
        "model.data.data_prefix": {"train": [str(training.train_rows)], "validation": valid, "test": valid},
        "model.data.seq_length": training.max_seq_len_tokens,
        "pretrained_checkpoint.restore_from_path": str(nemo),
    }


def _teacher_keys(
    training: Training, objective: TeacherObjective, nemo: Path, context: TaskContext, server: ForkServer | None
) -> dict[str, Any]:
    logits = cache_logits(training, objective, context, server)
    parts = {"train": logits.train, "validation": logits.valid, "test": logits.valid}
    return {
        "model.knowledge_distillation.kd_loss": objective.kd_loss,
        "model.knowledge_distillation.kd_loss_weight": objective.kd_loss_weight,
        "model.knowledge_distillation.sft_loss_weight": objective.sft_loss_weight,
        "model.data.top_k": objective.top_k,
        "model.data.n_examples_per_chunk": logits.rows_per_file,
        "model.data.n_chunks": {part: logits.num_files(name) for part, name in parts.items()},
        "model.data.data_prefix": {part: [str(name)] for part, name in parts.items()},
        "model.data.seq_length": training.max_seq_len_tokens,
        "pretrained_checkpoint.restore_from_path": str(nemo),
    }
