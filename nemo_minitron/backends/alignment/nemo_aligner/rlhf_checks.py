"""Checks of PPO and REINFORCE settings. NeMo-Aligner finds most of these problems only after loading the models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_minitron.backends.alignment.nemo_aligner.model_config import unknown_to_nemo
from nemo_minitron.families import ModelShape
from nemo_minitron.schema.rlhf import Rlhf


@dataclass(frozen=True)
class Limits:
    """Sizes of a model that limit layouts and lengths."""

    num_layers: int
    num_query_groups: int
    max_position_embeddings: int


@dataclass(frozen=True)
class RlhfFacts:
    """Facts about models and prompts that the settings are checked against. Paths are absolute."""

    actor_model: Path
    """Hugging Face folder of the model to train."""
    actor_shape: ModelShape
    stop: str | None
    """Text that ends an answer; None: the tokenizer has no such token."""
    reward: Literal["regression", "ranking"]
    reward_nemo: Path
    reward_tokenizer: Path
    reward_limits: Limits
    num_prompts: int
    num_valid_prompts: int
    misunderstandings: tuple[str, ...] = ()
    """Reasons why the reward model would misread the actor's answers, as error messages."""


def longest_prompt_tokens(settings: Rlhf) -> int:
    """Return the longest usable prompt. NeMo-Aligner silently replaces prompts longer than half the sequence."""
    return min(settings.max_seq_len_tokens // 2, settings.max_seq_len_tokens - settings.max_new_tokens)


def inference_dp(settings: Rlhf) -> int:
    """Return how many ranks of the actor roll out different prompts; with TensorRT-LLM, pipeline stages do as well."""
    layout = settings.actor_layout
    return max(1, layout.dp * (layout.pp if settings.trt_llm else 1))


def rollouts_per_step(settings: Rlhf) -> int:
    """Return the number of answers that a step generates."""
    return settings.num_rollout_prompts * (settings.rollouts_per_prompt if settings.algorithm == "reinforce" else 1)


def steps_per_epoch(settings: Rlhf, facts: RlhfFacts) -> int:
    """Return the number of complete batches of prompts in an epoch, at least 1."""
    return max(1, facts.num_prompts // settings.num_rollout_prompts)


def rlhf_problems(settings: Rlhf, facts: RlhfFacts) -> Iterator[str]:
    """Yield each problem of the settings, one line each."""
    yield from facts.misunderstandings
    yield from _layouts(settings, facts)
    yield from _batches(settings)
    yield from _lengths(settings, facts)
    for key, needed, found in (
        ("num_rollout_prompts", settings.num_rollout_prompts, facts.num_prompts),
        ("num_valid_prompts", settings.num_valid_prompts, facts.num_valid_prompts),
    ):
        if needed > found:
            limit = longest_prompt_tokens(settings)
            yield f"{key} = {needed}: there are {found} different prompts of up to {limit} tokens."
    for low, high in (("min_lr", "lr"), ("critic_min_lr", "critic_lr")):
        if getattr(settings, low) > getattr(settings, high):
            yield f"{low} = {getattr(settings, low)}: above {high} = {getattr(settings, high)}."
    if facts.reward == "regression" and not any(settings.attribute_weights.values()):
        yield "attribute_weights: all are 0, so the reward would be 0 for every answer."


def _layouts(settings: Rlhf, facts: RlhfFacts) -> Iterator[str]:
    for key, layout, model in (
        ("actor_layout", settings.actor_layout, _limits(facts.actor_shape)),
        ("server_layout", settings.server_layout, facts.reward_limits),
    ):
        if layout.world_size % (layout.tp * layout.pp):
            yield (
                f"{key}: tp * pp = {layout.tp} * {layout.pp} does not divide the GPUs, "
                f"num_nodes * gpus_per_node = {layout.num_nodes} * {layout.gpus_per_node}."
            )
        if model.num_layers % layout.pp:
            yield (
                f"{key}.pp = {layout.pp}: NeMo needs the same number of layers in every pipeline stage; "
                f"there are {model.num_layers}."
            )
        if model.num_query_groups % layout.tp:
            yield f"{key}.tp = {layout.tp}: must divide the {model.num_query_groups} query groups."
    if settings.server_host == "localhost" and settings.actor_layout.num_nodes > 1:
        yield "server_host = localhost: with an actor on several nodes, give the host name of the server's first node."
    reason = unknown_to_nemo(facts.actor_shape)
    if reason is not None:
        yield f"NeMo 2.1, on which NeMo-Aligner builds, does not support {reason}."


def _limits(shape: ModelShape) -> Limits:
    return Limits(shape.num_layers, shape.num_query_groups, shape.max_position_embeddings)


def _batches(settings: Rlhf) -> Iterator[str]:
    gbs, micro, dp = settings.global_batch_size, settings.micro_batch_size, max(1, settings.actor_layout.dp)
    programs = {"actor": dp} | ({"server": settings.server_layout.dp} if settings.algorithm == "ppo" else {})
    for who, ranks in programs.items():
        if gbs % (micro * max(1, ranks)):
            yield (
                f"global_batch_size = {gbs}: not a multiple of micro_batch_size * dp of the {who} = {micro} * {ranks}."
            )
    rollouts, made = rollouts_per_step(settings), "num_rollout_prompts"
    if settings.algorithm == "reinforce":
        made = "num_rollout_prompts * rollouts_per_prompt"
    if rollouts % gbs:
        yield f"{made} = {rollouts}: not a multiple of global_batch_size = {gbs}."
    steps = settings.num_steps * rollouts // gbs
    if settings.warmup_steps >= steps:
        yield f"warmup_steps = {settings.warmup_steps}: must be fewer than the optimizer steps, {steps}."
    unit, at_once = inference_dp(settings), settings.rollout_micro_batch_size
    for key in ("num_rollout_prompts", "num_valid_prompts"):
        if getattr(settings, key) % (at_once * unit):
            yield (
                f"{key} = {getattr(settings, key)}: not a multiple of rollout_micro_batch_size * ranks that roll out = "
                f"{at_once} * {unit}."
            )


def _lengths(settings: Rlhf, facts: RlhfFacts) -> Iterator[str]:
    if settings.max_new_tokens >= settings.max_seq_len_tokens:
        yield (
            f"max_new_tokens = {settings.max_new_tokens}: leaves no tokens for a prompt in max_seq_len_tokens = "
            f"{settings.max_seq_len_tokens}."
        )
    for name, model in (("the model", _limits(facts.actor_shape)), ("the reward model", facts.reward_limits)):
        most = model.max_position_embeddings
        if settings.max_seq_len_tokens > most:
            yield f"max_seq_len_tokens = {settings.max_seq_len_tokens}: {name} has {most} positions."
    if facts.stop is not None and "," in facts.stop:
        yield f"template: its end of turn, {facts.stop!r}, contains a comma, at which TensorRT-LLM would split it."
