"""What `minitron check` refuses in trainings on rewards, and the prompts that such a training gets."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.backends.alignment.base import Critic, Rollouts, TaskContext
from nemo_minitron.backends.alignment.nemo_aligner.config import complete_config
from nemo_minitron.backends.alignment.nemo_aligner.environment import ENTRY
from nemo_minitron.backends.alignment.nemo_aligner.rollout_keys import actor_keys, critic_keys, critic_steps
from nemo_minitron.backends.alignment.nemo_aligner.rollouts import ends_of_answers
from nemo_minitron.data.chat.prompts import read_prompts
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.rewards import RewardRule, RolloutTraining
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress
from tests.conftest import REPO, Cli


def check(minitron: Cli, kind: str, root: Path, *overrides: str) -> tuple[int, str]:
    code, output = minitron("check", REPO / f"recipes/toy/{kind}.yaml", f"execution.run_root={root}", *overrides)
    return code, " ".join(output.split())


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        ("reinforce", "rewards=[{rule: length}]", "rewards.0.target: required by rule length"),
        ("reinforce", "rewards=[]", "at least 1 item"),
        ("reinforce", "answers_per_prompt=1", "greater than or equal to 2"),
        ("reinforce", "global_batch_size=24", "does not divide the answers of a step, prompts_per_step * answers_per_"),
        ("reinforce", "generation_batch_size=10", "not a multiple of generation_batch_size * dp = 10 * 1"),
        ("reinforce", "num_valid_prompts=128", "valid_rows = 96"),
        ("reinforce", "max_new_tokens=256", "leaves no tokens of max_seq_len_tokens"),
        ("reinforce", "max_seq_len_tokens=100000", "positions"),
        ("reinforce", "min_lr=1.0", "above lr"),
        ("reinforce", "warmup_steps=100000", "must be fewer than the optimizer steps"),
        ("reinforce", "aligner.model.optim.weight_dekay=0.0", "Did you mean model.optim.weight_decay"),
        ("reinforce", "aligner.trainer.reinforce.max_steps=3", "set by the stage"),
        ("ppo", "critic_min_lr=1.0", "above critic_lr"),
        ("ppo", "ratio_clip=1.0", "less than 1"),
    ],
)
def test_check_names_what_is_wrong(kind: str, override: str, message: str, minitron: Cli, tmp_path: Path) -> None:
    code, output = check(minitron, kind, tmp_path, f"stages.{kind}.{override}")
    assert code == 2, output
    assert message in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reinforce.inputs.reward_model=null"], "reinforce.inputs.reward_model: required by rule reward_model"),
        (["reinforce.inputs.reward_model=sft"], "Allowed kinds for reward_model: train_attribute_model"),
        (["reinforce.rewards=[{rule: random}]"], "inputs.reward_model: no rule of stages.reinforce.rewards is reward"),
        (["reinforce.rewards=[{rule: reward_model}, {rule: reward_model}]"], "at most one of the rules"),
        (["reinforce.rewards=[{rule: random, attribute_weights: {humor: 1}}]"], "only rule reward_model has attribute"),
        (["reinforce.rewards=[{rule: reward_model, attribute_weights: {humor: 0}}]"], "would be 0 for every answer"),
        (["reinforce.rewards=[{rule: reward_model, attribute_weights: {wit: 1}}]"], "attribute_weights.wit"),
        (["attribute_model.reward=ranking"], "has reward = ranking, which has no attributes"),
    ],
)
def test_check_names_what_is_wrong_with_a_reward_model(
    overrides: list[str], message: str, minitron: Cli, tmp_path: Path
) -> None:
    code, output = check(minitron, "reinforce_model", tmp_path, *(f"stages.{override}" for override in overrides))
    assert code == 2, output
    assert message in output


@pytest.mark.parametrize("kind", ["reinforce", "ppo", "reinforce_model"])
def test_the_toy_recipes_are_valid(kind: str, minitron: Cli, tmp_path: Path) -> None:
    code, output = check(minitron, kind, tmp_path)
    assert code == 0, output


def rollouts(critic: Critic | None, tmp_path: Path) -> Rollouts:
    return Rollouts(
        method="reinforce" if critic is None else "ppo",
        critic=critic,
        model_dir=tmp_path,
        train_prompts=tmp_path / "train.jsonl",
        valid_prompts=tmp_path / "valid.jsonl",
        num_train_prompts=40,
        stop="<end>",
        evaluator=[],
        reward_model=None,
        num_steps=7,
        prompts_per_step=16,
        answers_per_prompt=4 if critic is None else 1,
        global_batch_size=8,
        generation_batch_size=4,
        num_valid_prompts=8,
        max_seq_len_tokens=64,
        max_new_tokens=16,
        temperature=1.0,
        kl_penalty=0.0,
        lr=1e-4,
        min_lr=0.0,
        warmup_steps=0,
        valid_interval_steps=2,
        seed=1,
    )


CRITIC = Critic(1e-4, 0.0, 2, ratio_clip=0.2, value_clip=0.2, discount_factor=1.0, gae_lambda=0.95, entropy_bonus=0.0)


@pytest.mark.parametrize("critic", [None, CRITIC])
def test_configs_are_complete(critic: Critic | None, tmp_path: Path) -> None:
    settings = rollouts(critic, tmp_path)
    context = TaskContext("rl", tmp_path, Parallel(micro_batch_size=4), "cpu", 1, Progress(), StopRequest())
    keys = actor_keys(settings, tmp_path / "nemo", context)
    found = complete_config(settings.method, keys, {}, on_cpu=True, where="test")
    assert found["model"]["micro_batch_size"] == (1 if critic is None else 4)
    assert found["trainer"]["max_epochs"] == 4  # 40 prompts are 2 steps
    assert found["trainer"][settings.method]["max_steps"] == 7
    # NeMo's learning-rate schedule counts optimizer steps: 8 for 64 answers, 2 for 16.
    assert found["trainer"]["max_steps"] == 7 * (8 if critic is None else 2)
    assert found["trainer"][settings.method]["rollout_batch_seq_length"] is None
    if critic is not None:
        keys = critic_keys(settings, critic, tmp_path / "nemo", tmp_path)
        assert complete_config("critic", keys, {}, on_cpu=True, where="test")["model"]["loss_clip_val"] == 0.2


@pytest.mark.parametrize(("tp", "length"), [(1, None), (2, 64)])
def test_answers_are_padded_to_a_length_that_sequence_parallelism_can_split(
    tp: int, length: int | None, tmp_path: Path
) -> None:
    settings = rollouts(None, tmp_path)
    layout = Parallel(tp=tp, sequence_parallel=True)
    context = TaskContext("rl", tmp_path, layout, "cpu", 1, Progress(), StopRequest())
    keys = actor_keys(settings, tmp_path / "nemo", context)
    found = complete_config("reinforce", keys, {}, on_cpu=True, where="test")
    assert found["trainer"]["reinforce"]["rollout_batch_seq_length"] == length


def test_the_critic_trains_on_every_step_of_the_actor_and_on_warmup(tmp_path: Path) -> None:
    settings = rollouts(CRITIC, tmp_path)
    assert [critic_steps(settings, steps) for steps in (0, 1, 5)] == [0, 6, 14]


def training_on_prompts(rule: str, prompts_per_step: int, global_batch_size: int) -> RolloutTraining:
    return RolloutTraining(
        rewards=(RewardRule(rule=rule),),
        num_steps=1,
        prompts_per_step=prompts_per_step,
        global_batch_size=global_batch_size,
        generation_batch_size=1,
        num_valid_prompts=1,
        max_seq_len_tokens=200,
        max_new_tokens=20,
        lr=1e-3,
    )


def toy_template() -> ChatTemplate:
    return ChatTemplate.load(REPO / "nemo_minitron/toy/model", "chatml", whole_markers=False, day=date(2024, 7, 26))


def test_answers_end_with_the_template_or_with_the_text(tmp_path: Path) -> None:
    settings = replace(rollouts(None, tmp_path), model_dir=REPO / "nemo_minitron/toy/model")
    assert ends_of_answers(settings) == ["<end>", "<|endoftext|>"]
    assert ends_of_answers(replace(settings, stop="<|endoftext|>")) == ["<|endoftext|>"]


RULES_SEE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from rule_server import _Rewards

rewards = _Rewards(json.loads(sys.argv[2]), {})
ids = lambda text: rewards._tokenizer.encode(text, add_special_tokens=False).ids
print(json.dumps([rewards._answer(ids("What is 2?") + ids(answer))["answer"] for answer in sys.argv[3:]]))
"""


def test_rules_do_not_see_the_end_of_an_answer(tmp_path: Path) -> None:
    """An answer that ended with the end-of-text token did not match patterns that end in `$`."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": "What is 2?"}) + "\n")
    task = {
        "prompts": [str(prompts)],
        "tokenizer": str(REPO / "nemo_minitron/toy/model"),
        "ends": ["<end>", "<|endoftext|>"],
        "evaluator": [],
        "reward_model": None,
    }
    answers = ["It is 2.<end>", "It is 2.<|endoftext|>", "It is 2."]
    command = [sys.executable, "-c", RULES_SEE, str(ENTRY), json.dumps(task), *answers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["It is 2."] * 3


def test_every_prompt_is_read_once(tmp_path: Path) -> None:
    template, question = toy_template(), [{"role": "user", "content": "What is 1?"}]
    answer = {"role": "assistant", "content": "It is 1."}
    file = tmp_path / "train.jsonl"
    conversations = [[*question, answer], question, [{"role": "user", "content": "x" * 400}]]
    rows = [{"messages": messages, "origin": "t"} for messages in conversations]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"chosen": [], "rejected": [], "origin": "t"}]))
    seen: set[str] = set()
    found = read_prompts(file, template, longest_tokens=100, seen=seen)
    assert [(prompt.text, prompt.row["messages"][-1]) for prompt in found.prompts] == [
        (template.prompt(question), answer)
    ]
    assert found.counts() == {"prompts": 1, "repeated": 1, "too_long": 1, "bad": 1, "left_over": 0}
    assert read_prompts(file, template, longest_tokens=100, seen=seen).prompts == []


def test_the_row_of_a_prompt_gives_the_reference_and_the_rules() -> None:
    from nemo_minitron.stages.common.prompts import _for_rules

    question, rules = (
        {"role": "user", "content": "q"},
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    )
    assert _for_rules({"messages": [question], **rules, "origin": "t"}) == rules
    answered = {"messages": [question, {"role": "assistant", "content": "a"}]}
    assert _for_rules(answered) == {"reference": "a"}


def test_prompts_fill_whole_steps(tmp_path: Path) -> None:
    """NeMo-Aligner's PPO stopped at the end of an epoch: "16 is not divisible by 32"."""
    from nemo_minitron.errors import DataError
    from nemo_minitron.schema.execution import Execution
    from nemo_minitron.stages.artifacts import ChatRows
    from nemo_minitron.stages.common.prompts import write_prompts
    from nemo_minitron.stages.context import StageContext

    params, template = training_on_prompts("random", 4, 4), toy_template()
    for part, numbers in (("train", range(10)), ("valid", range(10, 13))):
        turns = [[{"role": "user", "content": f"What is {number}?"}] for number in numbers]
        rows = [json.dumps({"messages": messages, "origin": "t"}) + "\n" for messages in turns]
        (tmp_path / f"{part}.jsonl").write_text("".join(rows))
    ctx = StageContext("rl", "test", tmp_path, tmp_path, Execution(), Progress(silent=True))
    chats = ChatRows("chats", "chat_data", tmp_path, "", {})
    found = write_prompts(params, template, chats, ctx)
    assert found.stop == "<|im_end|>"
    assert (found.num_train, found.facts["train"]["left_over"]) == (8, 2)
    assert [len(file.read_text().splitlines()) for file in (found.train, found.valid)] == [8, 3]
    template.tokenizer.eos_token = None
    without_end = replace(
        template, jinja="{% for message in messages %}{{ message['content'] }}\n{% endfor %}", stop=None
    )
    with pytest.raises(DataError, match="writes no special token after an answer"):
        write_prompts(params, without_end, chats, ctx)


def test_final_numbers_need_answers(minitron: Cli, tmp_path: Path) -> None:
    keys = ("stages.chat_data.rows=prompts", "stages.reinforce.rewards=[{rule: final_number}]")
    code, output = check(minitron, "reinforce", tmp_path, *keys)
    assert code == 2, output
    assert "rule final_number needs the answers of the rows" in output
    assert "evaluate_reinforce.inputs.chats: stage chat_data has prompts" in output


def test_a_reference_without_a_number_is_found_before_the_training(tmp_path: Path) -> None:
    from nemo_minitron.errors import DataError
    from nemo_minitron.stages.common.prompts import Prompts
    from nemo_minitron.stages.rollouts.run import _require_checkable

    params: Any = training_on_prompts("final_number", 1, 1)
    prompts = Prompts(tmp_path / "train.jsonl", tmp_path / "valid.jsonl", 1, "", {})
    prompts.train.write_text(json.dumps({"text": "What is 2 * 2?", "reference": "#### 4"}) + "\n")
    prompts.valid.write_text(json.dumps({"text": "What is 2 + 2?", "reference": "#### four"}) + "\n")
    with pytest.raises(DataError, match="no final number"):
        _require_checkable(params, prompts)
    _require_checkable(training_on_prompts("random", 1, 1), prompts)  # type: ignore[arg-type]
    prompts.valid.write_text(prompts.train.read_text())
    _require_checkable(params, prompts)


def test_instructions_are_tried_before_the_training(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from nemo_minitron.errors import DataError
    from nemo_minitron.evaluation.instructions import require_checkable, with_rules

    good = {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"relation": "at least"}]}
    with pytest.raises(DataError, match="lacks num_words"):
        require_checkable(with_rules("q", good))
    good["kwargs"] = [{"relation": "at least", "num_words": 3}]
    require_checkable(with_rules("q", good))
    with pytest.raises(DataError, match="unknown rule: 'x'"):
        require_checkable(with_rules("q", {"instruction_id_list": ["x"], "kwargs": [{}]}))
    with pytest.raises(DataError, match="has no"):
        with_rules("q", {"reference": "a"})
