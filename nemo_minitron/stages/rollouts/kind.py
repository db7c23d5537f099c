"""The kinds of stage that train a model on rewards of its own answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nemo_minitron.backends.alignment.base import alignment_backend
from nemo_minitron.backends.alignment.rules import model_problems, sequence_problems
from nemo_minitron.families import ModelShape
from nemo_minitron.schema.alignment import RewardTraining
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.rewards import rule_problems
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, StageKind
from nemo_minitron.stages.rollouts.params import PpoStage, ReinforceStage
from nemo_minitron.workload.load import Load, alignment_load

RolloutStage = ReinforceStage | PpoStage


def _shape(name: str, params: RolloutStage, view: RecipeView) -> ModelShape | None:
    return view.shape(params.inputs.model)


def _problems(name: str, params: RolloutStage, view: RecipeView) -> Iterator[str]:
    key, layout, shape = f"stages.{name}", view.layout(name), view.shape(params.inputs.model)
    problems = alignment_backend().override_problems(params.kind, params.aligner)
    yield from (f"{key}.aligner.{problem}" for problem in problems)
    yield from rule_problems(f"{key}.rewards", params.rewards)
    yield from _reward_model_problems(key, params, view)
    yield from _row_problems(key, params, view)
    yield from _size_problems(key, params, layout)
    yield from sequence_problems(key, params.max_seq_len_tokens, layout)
    yield from model_problems(key, shape, layout)
    if shape is not None and params.max_seq_len_tokens > shape.max_position_embeddings:
        most = shape.max_position_embeddings
        yield f"{key}.max_seq_len_tokens = {params.max_seq_len_tokens}: the model has {most} positions."


def _reward_model_problems(key: str, params: RolloutStage, view: RecipeView) -> Iterator[str]:
    rule, stage = params.model_rule, params.inputs.reward_model
    if rule is None and stage is not None:
        yield f"{key}.inputs.reward_model: no rule of {key}.rewards is reward_model."
    if rule is not None and stage is None:
        yield f"{key}.inputs.reward_model: required by rule reward_model; name a train_attribute_model stage."
    model = view.stages.get(stage or "")
    if rule is None or not isinstance(model, RewardTraining):
        return
    if rule.attribute_weights is not None and model.reward == "ranking":
        yield f"{key}.rewards: attribute_weights, but stage {stage} has reward = ranking, which has no attributes."
    shape = view.shape(model.inputs.model)
    if shape is not None and params.max_seq_len_tokens > shape.max_position_embeddings:
        most = shape.max_position_embeddings
        yield f"{key}.max_seq_len_tokens = {params.max_seq_len_tokens}: the reward model has {most} positions."


def _row_problems(key: str, params: RolloutStage, view: RecipeView) -> Iterator[str]:
    held = view.chat_rows(params.inputs.chats)
    if held is None:
        return
    if held.rows == "pairs" and held.rated_from is None:
        yield f"{key}.inputs.chats: stage {params.inputs.chats} has rows: {held.rows}, not conversations or prompts."
    if held.rows == "prompts" and any(rule.rule == "final_number" for rule in params.rewards):
        yield (
            f"{key}.rewards: rule final_number needs the answers of the rows, and stage {params.inputs.chats} has "
            "rows: prompts."
        )
    if held.valid_rows < params.num_valid_prompts:
        yield (
            f"{key}.num_valid_prompts = {params.num_valid_prompts}: stage {params.inputs.chats} has valid_rows = "
            f"{held.valid_rows}."
        )


def _size_problems(key: str, params: RolloutStage, layout: Parallel) -> Iterator[str]:
    """Yield conflicts between numbers of answers, batch sizes, lengths and learning rates."""
    answers = params.prompts_per_step * params.answers_per_prompt
    if params.global_batch_size % layout.dp:
        yield f"{key}.global_batch_size = {params.global_batch_size}: not a multiple of dp = {layout.dp}."
    if answers % params.global_batch_size:
        yield (
            f"{key}.global_batch_size = {params.global_batch_size}: does not divide the answers of a step, "
            f"prompts_per_step * answers_per_prompt = {params.prompts_per_step} * {params.answers_per_prompt}."
        )
    for name in ("prompts_per_step", "num_valid_prompts"):
        if getattr(params, name) % (params.generation_batch_size * layout.dp):
            yield (
                f"{key}.{name} = {getattr(params, name)}: not a multiple of generation_batch_size * dp = "
                f"{params.generation_batch_size} * {layout.dp}."
            )
    if params.max_new_tokens >= params.max_seq_len_tokens:
        yield f"{key}.max_new_tokens = {params.max_new_tokens}: leaves no tokens of max_seq_len_tokens for a prompt."
    if isinstance(params, PpoStage) and params.global_batch_size % (layout.micro_batch_size * layout.dp):
        yield (
            f"{key}.global_batch_size = {params.global_batch_size}: not a multiple of micro_batch_size * dp = "
            f"{layout.micro_batch_size} * {layout.dp}."
        )
    if isinstance(params, PpoStage) and params.critic_min_lr > params.critic_lr:
        yield f"{key}.critic_min_lr = {params.critic_min_lr}: above critic_lr = {params.critic_lr}."
    if params.min_lr > params.lr:
        yield f"{key}.min_lr = {params.min_lr}: above lr = {params.lr}."
    optimizer_steps = params.num_steps * answers // params.global_batch_size
    if params.warmup_steps >= optimizer_steps:
        yield f"{key}.warmup_steps = {params.warmup_steps}: must be fewer than the optimizer steps, {optimizer_steps}."


def _functions(params: RolloutStage) -> Iterator[str]:
    return (rule.function for rule in params.rewards if rule.rule == "function" and rule.function is not None)


def _num_servers(params: RolloutStage) -> int:
    """Count the server of the rewards, with the reward model's on its node, and, for ppo, that of the critic."""
    return 2 if isinstance(params, PpoStage) else 1


def _load(name: str, params: RolloutStage, layout: Parallel, view: RecipeView) -> Load | None:
    """Estimate the training on the answers; generating them, which takes longer on a CPU, is not counted."""
    shape = view.shape(params.inputs.model)
    if shape is None:
        return None
    answers = params.prompts_per_step * params.answers_per_prompt
    steps = params.num_steps * (answers // params.global_batch_size)
    sizes = (params.global_batch_size, params.max_seq_len_tokens)
    return alignment_load(shape, steps, *sizes, layout, has_reference=True)


REINFORCE = StageKind(
    name="reinforce",
    params=ReinforceStage,
    run="nemo_minitron.stages.rollouts.run:reinforce",
    outputs=(Output.MODEL,),
    inputs={"model": MODELS, "chats": (Output.CHAT_ROWS,), "reward_model": (Output.REWARD_MODEL,)},
    starts_ranks=True,
    needs_aligner=True,
    whole_sequences=True,
    trains=True,
    report="rewards",
    chat_rank=7,
    version=2,
    functions=_functions,
    shape=_shape,
    problems=_problems,
    load=_load,
    num_servers=_num_servers,
)
PPO = replace(REINFORCE, name="ppo", params=PpoStage, run="nemo_minitron.stages.rollouts.run:ppo", chat_rank=8)
