"""The stages that train a model on rewards of its own answers, through an alignment backend."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.base import Critic, ModelReward, Rollouts, alignment_backend
from nemo_minitron.data.chat.published import publish_template
from nemo_minitron.data.chat.reward_texts import misreadings
from nemo_minitron.data.chat.rows import ATTRIBUTES
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.evaluation.final_number import final_number
from nemo_minitron.evaluation.instructions import require_checkable, with_rules
from nemo_minitron.evaluation.rewards import make_rules
from nemo_minitron.hf.checkpoint import model_facts
from nemo_minitron.processes.same_code import START
from nemo_minitron.schema.rewards import HELPSTEER2_WEIGHTS, RewardRule
from nemo_minitron.stages.artifacts import ChatRows, Model, RewardModel
from nemo_minitron.stages.common.alignment_training import task_context
from nemo_minitron.stages.common.prompts import Prompts, write_prompts
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.rollouts.params import PpoStage, ReinforceStage

RolloutStage = ReinforceStage | PpoStage
RULES_FILE = "rules.json"
MEASURED = ("valid_reward", "valid_reward_se", "valid_kl_nats_per_token", "valid_answer_tokens", "valid_ended")
"""Metrics of the first and the last validation in the manifest, without their prefix."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model
    chats: ChatRows
    reward_model: RewardModel | None = None


def reinforce(params: ReinforceStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Train on rewards; publish a Hugging Face model with curves and the answers to held-out prompts.

    Raises:
        DataError: rows that cannot be used, too few of them, or a rule that does not fit a row.
        ConfigError: a reward function that cannot be imported, a reward model that would misread the answers, or a key
            that the backend does not support.
        EnvironmentProblem: the backend is not installed, or a process failed.
        Interrupted: a stop was requested; the same command resumes.
    """
    return _train(params, inputs, ctx, None)


def ppo(params: PpoStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Train on rewards with a critic; publish what `reinforce` does.

    Raises:
        As `reinforce`.
    """
    critic = Critic(
        lr=params.critic_lr,
        min_lr=params.critic_min_lr,
        warmup_steps=params.critic_warmup_steps,
        ratio_clip=params.ratio_clip,
        value_clip=params.value_clip,
        discount_factor=params.discount_factor,
        gae_lambda=params.gae_lambda,
        entropy_bonus=params.entropy_bonus,
    )
    return _train(params, inputs, ctx, critic)


def _train(params: RolloutStage, inputs: Inputs, ctx: StageContext, critic: Critic | None) -> Result:
    make_rules(params.program_rules)  # finds a function that cannot be imported before any process starts
    template = ChatTemplate.load(
        inputs.model.path, params.template, whole_markers=params.whole_markers, day=params.template_date
    )
    reward_model = _reward_model(params, inputs, template, ctx)
    prompts = write_prompts(params, template, inputs.chats, ctx)
    _require_checkable(params, prompts)
    rollouts = _rollouts(params, inputs, prompts, ctx, critic, reward_model)
    curve = alignment_backend().train_on_rewards(rollouts, ctx.out_dir, task_context(ctx))
    publish_template(ctx.out_dir, params.template)
    return {
        **model_facts(ctx.out_dir),
        "method": params.kind,
        "num_steps": curve[-1]["step"],
        **_change(curve),
        "prompts": prompts.facts,
    }


def _require_checkable(params: RolloutStage, prompts: Prompts) -> None:
    """Find rows whose instructions or final number cannot be checked before any process starts.

    Raises:
        DataError: there is such a row.
    """
    rules = {rule.rule for rule in params.rewards}
    for file in (prompts.train, prompts.valid):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "instructions" in rules:
                require_checkable(with_rules(row["text"], row))
            if "final_number" in rules and final_number(row.get("reference", "")) is None:
                raise DataError(
                    "Rule final_number would give 0 for every answer: the row's own answer has no final number that "
                    "can be read.",
                    where=f"answer to {row['text'][-60:]!r}",
                    next_step="Choose rows whose answers end with `#### NUMBER`, or remove the rule.",
                )


def _reward_model(
    params: RolloutStage, inputs: Inputs, template: ChatTemplate, ctx: StageContext
) -> ModelReward | None:
    """Return the settings of the reward model; None: no rule uses one.

    Raises:
        ConfigError: it would misread the answers.
    """
    rule, model = params.model_rule, inputs.reward_model
    if rule is None or model is None:
        return None
    tokenizer = alignment_backend().reward_tokenizer(model.path)
    for problem in misreadings(inputs.model.path, template, tokenizer, model.stage, model.result):
        raise ConfigError(problem, where=f"stages.{ctx.name}.inputs.reward_model")
    given = HELPSTEER2_WEIGHTS if rule.attribute_weights is None else rule.attribute_weights
    weights = {str(name): weight for name, weight in given.items()}
    regression = model.reward == "regression"
    return ModelReward(model.path, rule.weight, [weights.get(name, 0.0) for name in ATTRIBUTES] if regression else None)


def _rollouts(
    params: RolloutStage,
    inputs: Inputs,
    prompts: Prompts,
    ctx: StageContext,
    critic: Critic | None,
    reward_model: ModelReward | None,
) -> Rollouts:
    return Rollouts(
        method=params.kind,
        critic=critic,
        model_dir=inputs.model.path,
        train_prompts=prompts.train,
        valid_prompts=prompts.valid,
        num_train_prompts=prompts.num_train,
        stop=prompts.stop,
        evaluator=_evaluator(params.program_rules, ctx.work_dir),
        reward_model=reward_model,
        num_steps=params.num_steps,
        prompts_per_step=params.prompts_per_step,
        answers_per_prompt=params.answers_per_prompt,
        global_batch_size=params.global_batch_size,
        generation_batch_size=params.generation_batch_size,
        num_valid_prompts=params.num_valid_prompts,
        max_seq_len_tokens=params.max_seq_len_tokens,
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        kl_penalty=params.kl_penalty,
        lr=params.lr,
        min_lr=params.min_lr,
        warmup_steps=params.warmup_steps,
        valid_interval_steps=params.valid_interval_steps,
        seed=params.seed,
        overrides=params.aligner,
    )


def _evaluator(rules: Sequence[RewardRule], work_dir: Path) -> list[str]:
    """Write the rules, and return the command of the process that computes rewards by them; without rules, nothing."""
    if not rules:
        return []
    file = work_dir / RULES_FILE
    file.write_text(json.dumps([rule.model_dump(mode="json") for rule in rules]), encoding="utf-8")
    return [sys.executable, str(START), "rewards", str(file)]


def _change(curve: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the metrics of the held-out prompts before the first step and after the last."""
    valid = [row for row in curve if "valid_reward" in row]
    if not valid:
        raise DataError("The training has measured no held-out prompts.")
    names = {name: name.removeprefix("valid_") for name in MEASURED}
    return {
        place: {short: row[name] for name, short in names.items() if name in row}
        for place, row in (("start", valid[0]), ("end", valid[-1]))
    }
