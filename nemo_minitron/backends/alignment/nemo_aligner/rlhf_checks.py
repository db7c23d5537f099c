"""Sizes of PPO and REINFORCE that do not fit together; NeMo-Aligner finds most of them after the models are loaded."""

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
    """Of a model, what a layout and a length must respect."""

    num_layers: int
    num_query_groups: int
    max_position_embeddings: int


@dataclass(frozen=True)
class RlhfFacts:
    """What the settings are checked against. Paths are absolute."""

    actor_model: Path
    """A Hugging Face folder."""
    actor_shape: ModelShape
    stop: str | None
    """The text that ends a turn."""
    reward: Literal["regression", "ranking"]
    reward_nemo: Path
    reward_tokenizer: Path
    reward_limits: Limits
    num_prompts: int
    num_valid_prompts: int
    misunderstandings: tuple[str, ...] = ()
    """Why the reward model would not read what the actor writes."""


def longest_prompt_tokens(settings: Rlhf) -> int:
    """NeMo-Aligner puts another prompt in place of one that is longer than half the sequence, without a word."""
    return min(settings.max_seq_len_tokens // 2, settings.max_seq_len_tokens - settings.max_new_tokens)


def inference_dp(settings: Rlhf) -> int:
    """Ranks of the actor that roll out different prompts: with TensorRT-LLM pipeline stages do, too."""
    layout = settings.actor_layout
    return max(1, layout.dp * (layout.pp if settings.trt_llm else 1))


def rollouts_per_step(settings: Rlhf) -> int:
    """Answers of one step."""
    return settings.num_rollout_prompts * (settings.rollouts_per_prompt if settings.algorithm == "reinforce" else 1)


def steps_per_epoch(settings: Rlhf, facts: RlhfFacts) -> int:
    """Whole batches of prompts."""
    return max(1, facts.num_prompts // settings.num_rollout_prompts)


def rlhf_problems(settings: Rlhf, facts: RlhfFacts) -> Iterator[str]:
    """What does not fit, one line each."""
    yield from facts.misunderstandings
    yield from _layouts(settings, facts)
    yield from _batches(settings)
    yield from _lengths(settings, facts)
    for key, needed, found in (
        ("num_rollout_prompts", settings.num_rollout_prompts, facts.num_prompts),
        ("num_valid_prompts", settings.num_valid_prompts, facts.num_valid_prompts),
    ):
        if needed > found:
            yield f"{key} = {needed}: there are {found} prompts of up to {longest_prompt_tokens(settings)} tokens."
    for low, high in (("min_lr", "lr"), ("critic_min_lr", "critic_lr")):
        if getattr(settings, low) > getattr(settings, high):
            yield f"{low} = {getattr(settings, low)}: above {high} = {getattr(settings, high)}."
    if facts.reward == "regression" and not any(settings.attribute_weights.values()):
        yield "attribute_weights: none is other than 0; the reward would be 0 for every answer."


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
            yield f"{key}.pp = {layout.pp}: NeMo needs as many layers in every stage; there are {model.num_layers}."
        if model.num_query_groups % layout.tp:
            yield f"{key}.tp = {layout.tp}: must divide the {model.num_query_groups} query groups."
    if settings.server_host == "localhost" and settings.actor_layout.num_nodes > 1:
        yield "server_host = localhost: an actor on several nodes needs the name of the server's first node."
    reason = unknown_to_nemo(facts.actor_shape)
    if reason is not None:
        yield f"NeMo 2.1, which NeMo-Aligner builds on, has no models with {reason}."


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
            f"max_new_tokens = {settings.max_new_tokens}: leaves no room for a prompt in max_seq_len_tokens = "
            f"{settings.max_seq_len_tokens}."
        )
    for name, model in (("the model", _limits(facts.actor_shape)), ("the reward model", facts.reward_limits)):
        most = model.max_position_embeddings
        if settings.max_seq_len_tokens > most:
            yield f"max_seq_len_tokens = {settings.max_seq_len_tokens}: {name} has {most} positions."
    if facts.stop is not None and "," in facts.stop:
        yield f"template: its end of a turn, {facts.stop!r}, holds a comma, at which TensorRT-LLM would split it."
