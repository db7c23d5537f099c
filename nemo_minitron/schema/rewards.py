"""Keys of trainings on rewards, and of the rewards that a program or a reward model computes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from nemo_minitron.schema.base import TEMPLATE_DATE, Fraction, Schema, Seed
from nemo_minitron.schema.chats import AttributeName, TemplateName

RuleName = Literal[
    "final_number", "length", "contains", "matches", "instructions", "function", "random", "reward_model"
]
LengthUnit = Literal["characters", "words", "tokens"]
HELPSTEER2_WEIGHTS: dict[AttributeName, float] = {
    "helpfulness": 0.65,
    "correctness": 0.8,
    "coherence": 0.45,
    "complexity": 0.55,
    "verbosity": -0.4,
}
"""Weights of the attributes in one reward (2406.08673, for its 70B model)."""


class RewardRule(Schema):
    """A reward that a program or a trained reward model computes from an answer. Most rules give 0 to 1."""

    rule: RuleName
    """final_number: 1 if the answer ends with the number of the row's own answer, as in GSM8K. length: 1 at `target`,
    falling to 0 at 0 and at twice the target. contains: 1 if the answer has the word `text`. matches: 1 if the regular
    expression `pattern` is found in it. instructions: the share of the row's rules that it follows, as in IFEval.
    function: what your Python function returns. random: a number that does not depend on the answer, as a control.
    reward_model: the output of the model of the stage inputs.reward_model."""
    weight: float = 1.0
    """Factor of this reward in the sum."""
    unit: LengthUnit = "words"
    """What `length` counts. The text that ends an answer counts as tokens only."""
    target: PositiveInt | None = None
    """Length with the highest reward."""
    text: Annotated[str, Field(min_length=1)] | None = None
    """Word that the answer must contain; upper and lower case are the same."""
    pattern: Annotated[str, Field(min_length=1)] | None = None
    """Regular expression of Python's `re` that must be found in the answer."""
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`module:function` of an installed package, called as function(prompt, answer, row); returns a finite number.
    `row` has "reference", the row's own answer."""
    attribute_weights: dict[AttributeName, float] | None = None
    """Attributes -> one reward, for `reward_model` with a model that was trained by regression; the others have weight
    0. null: helpfulness 0.65, correctness 0.8, coherence 0.45, complexity 0.55, verbosity -0.4 (2406.08673)."""


NEEDED: dict[RuleName, str] = {"length": "target", "contains": "text", "matches": "pattern", "function": "function"}
"""Rule -> the key that it needs; the other rules ignore that key."""


def rule_problems(key: str, rules: Sequence[RewardRule]) -> Iterator[str]:
    """Yield what is wrong with the keys of the rules, one line each."""
    if sum(rule.rule == "reward_model" for rule in rules) > 1:
        yield f"{key}: at most one of the rules can be a reward_model."
    for number, rule in enumerate(rules):
        where, needed = f"{key}.{number}", NEEDED.get(rule.rule)
        if needed is not None and getattr(rule, needed) is None:
            yield f"{where}.{needed}: required by rule {rule.rule}."
        if rule.weight == 0:
            yield f"{where}.weight = 0: the rule would have no effect; leave it out."
        if rule.pattern is not None:
            try:
                re.compile(rule.pattern)
            except re.error as error:
                yield f"{where}.pattern: not a regular expression: {error}."
        if rule.attribute_weights is not None and rule.rule != "reward_model":
            yield f"{where}.attribute_weights: only rule reward_model has attributes."
        if rule.attribute_weights is not None and not any(rule.attribute_weights.values()):
            yield f"{where}.attribute_weights: all are 0, so the reward would be 0 for every answer."


class RolloutTraining(Schema):
    """How a model is trained on rewards of its own answers to the prompts of conversations."""

    rewards: Annotated[tuple[RewardRule, ...], Field(min_length=1)]
    """Rewards of an answer; their weighted sum is used. At most one of them is a reward model's."""
    num_steps: PositiveInt
    """Steps; in each the model answers prompts_per_step prompts, and is trained on all of these answers once."""
    prompts_per_step: PositiveInt
    """Prompts of a step."""
    global_batch_size: PositiveInt
    """Answers per optimizer step; divides the answers of a step."""
    generation_batch_size: PositiveInt
    """Answers that a process generates at a time; divides prompts_per_step and num_valid_prompts by data-parallel
    rank."""
    num_valid_prompts: PositiveInt
    """Held-out prompts that the model answers before the first step and every valid_interval_steps."""
    valid_interval_steps: PositiveInt = 10
    """Steps between two validations; a checkpoint is written at each."""
    max_seq_len_tokens: PositiveInt
    """Longest prompt and answer together. Prompts longer than half of it, or than what max_new_tokens leaves, are
    skipped."""
    max_new_tokens: PositiveInt
    """Longest answer; longer ones are cut off."""
    temperature: PositiveFloat = 1.0
    """Temperature at which answers are sampled. Other values than 1 sample from another distribution than the one that
    is trained."""
    kl_penalty: Annotated[float, Field(ge=0.0)] = 0.01
    """Factor of the penalty for moving away from the model at the start: NeMo-Aligner's initial_policy_kl_penalty."""
    lr: PositiveFloat
    """Peak learning rate. It falls along a cosine to min_lr."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warmup."""
    seed: Seed = 1234
    """Seed of the order of the prompts and of the sampled answers."""
    template: TemplateName = "model"
    """Chat template of the prompts. model: the one beside the tokenizer."""
    whole_markers: bool = True
    """Require that each marker of the template is a single token. false allows a tokenizer that spells them out, for
    experiments."""
    template_date: date = TEMPLATE_DATE
    """Date that a template writes into the prompts."""
    max_bad_fraction: Fraction = 0.0
    """Fraction of rows that may be unusable with this tokenizer."""
    aligner: dict[str, Any] = Field(default_factory=dict)
    """Any other key of NeMo-Aligner's config, nested as in configs/align. Unknown keys are refused."""

    @property
    def model_rule(self) -> RewardRule | None:
        """The rule of the reward model; None: there is none."""
        return next((rule for rule in self.rewards if rule.rule == "reward_model"), None)

    @property
    def program_rules(self) -> list[RewardRule]:
        """The rules that a program computes."""
        return [rule for rule in self.rewards if rule.rule != "reward_model"]

    @property
    def longest_prompt_tokens(self) -> int:
        """NeMo-Aligner replaces prompts longer than half the sequence by others without a warning."""
        return min(self.max_seq_len_tokens // 2, self.max_seq_len_tokens - self.max_new_tokens)
