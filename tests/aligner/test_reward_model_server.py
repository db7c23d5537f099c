"""NeMo-Aligner's server of a reward model: alone and with rules it gives the rewards of a direct call."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from nemo_minitron.backends.alignment.base import ModelReward, TaskContext
from nemo_minitron.backends.alignment.nemo_aligner.prediction import predict
from nemo_minitron.backends.alignment.nemo_aligner.rollout_keys import REWARD_MODEL_SOCKET
from nemo_minitron.backends.alignment.nemo_aligner.rollouts import _client, _reward_model_server
from nemo_minitron.backends.alignment.nemo_aligner.servers import running
from nemo_minitron.evaluation.rewards import Answer, make_rules, rewards
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.rewards import RewardRule
from nemo_minitron.system.interrupts import StopRequest
from tests.aligner.test_reward_server import ROWS, RULES, STOP, TOKENIZER, ask, server
from tests.support.aligner import Border, Layout, quiet, train, training_config, write_rows

pytestmark = pytest.mark.slow

WEIGHT, ATTRIBUTE_WEIGHTS = 0.5, [0.0, 0.0, 0.0, 0.0, 1.0, 0.5, 0.0, 0.0, -2.0]
RANKING = {
    "model.reward_model_type": "binary_ranking",
    "model.regression.num_attributes": 1,
    "model.micro_batch_size": 1,
    "model.forward_micro_batch_size": 1,
}
NUM_REQUESTS = 40


@pytest.fixture(scope="module")
def border(tmp_path_factory: pytest.TempPathFactory) -> Border:
    return Border(TOKENIZER, tmp_path_factory.mktemp("rewards") / "work").cross()


def published(kind: str, border: Border, root: Path) -> Path:
    """Return the folder of a reward model, as its stage publishes it; regression is trained on two pipeline stages."""
    rows, work, layout = root / "rows.jsonl", root / "training", Layout(pp=2 if kind == "regression" else 1)
    write_rows("reward_model", rows, ranking=kind == "ranking")
    keys = RANKING if kind == "ranking" else {}
    config = training_config("reward_model", border.nemo, rows, work, num_steps=4, layout=layout, keys=keys)
    train("reward_model", config, border.nemo, work, layout)
    out = root / "published"
    shutil.copytree(work / "trained", out / "nemo")
    shutil.copytree(border.nemo.with_name("nemo.tokenizer"), out / "nemo.tokenizer")
    return out


def requests() -> list[tuple[dict[str, str], str]]:
    """Return (row of the prompt, answer) of requests of several lengths; no token spans prompt and answer."""
    answers = [f"{number}. {'a' * (number % 13)} {'hound' if number % 3 else 'cat'}" for number in range(NUM_REQUESTS)]
    return [(ROWS[number % len(ROWS)], answer) for number, answer in enumerate(answers)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["regression", "ranking"])
def test_the_rewards_are_those_of_a_direct_call(kind: str, border: Border, tmp_path: Path) -> None:
    weights = ATTRIBUTE_WEIGHTS if kind == "regression" else None
    reward = ModelReward(published(kind, border, tmp_path), WEIGHT, weights)
    context = TaskContext("rl", tmp_path / "work", Parallel(), "cpu", 1, *quiet())
    context.work_dir.mkdir()
    alone = direct(reward, context)
    rules = [RewardRule(**rule) for rule in RULES]
    by_rules = [rewards(rules, make_rules(rules), [answer_of(row, text)])[0] for row, text in requests()]
    both = [WEIGHT * model + rule for model, rule in zip(alone, by_rules, strict=True)]
    whole = [(row["text"], text + STOP) for row, text in requests()]
    servers = [server(tmp_path / "rules", RULES, _client(reward)), _reward_model_server(reward, 8, context)]
    with running(servers, 1, StopRequest(), on_cpu=True) as started:
        variables = dict(started.variables)
        from_model = ask([[one] for one in whole], variables, REWARD_MODEL_SOCKET)
        from_sum = ask([[one] for one in whole], variables)
        together = ask([whole[:20], [("Not a prompt of the training", "a")]], variables)
        started.watch()
    assert [one[0] for one in from_model] == pytest.approx(alone, abs=1e-5)
    assert [one[0] for one in from_sum] == pytest.approx(both, abs=1e-5)
    assert together[0] == pytest.approx(both[:20], abs=1e-5)
    assert math.isnan(together[1][0])
    assert max(alone) - min(alone) > 1e-3


def ids(text: str) -> list[int]:
    found: list[int] = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return found


def answer_of(row: dict[str, str], text: str) -> Answer:
    return Answer(row["text"], text, len(ids(text + STOP)), row)


def direct(reward: ModelReward, context: TaskContext) -> list[float]:
    """Return the rewards that the model gives without a server."""
    texts = [row["text"] + text + STOP for row, text in requests()]
    for whole, (row, text) in zip(texts, requests(), strict=True):  # a server gets the tokens of both parts
        assert ids(whole) == ids(row["text"]) + ids(text + STOP)
    outputs = predict(reward.model_dir / "nemo", reward.model_dir / "nemo.tokenizer", texts, 7, context)
    weights = reward.attribute_weights or [1.0]
    return [sum(weight * x for weight, x in zip(weights, row, strict=True)) for row in outputs]
