"""NeMo-Aligner's server of a reward model: alone and with rules it gives the rewards of a direct call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from nemo_minitron.backends.alignment.base import ModelReward, TaskContext
from nemo_minitron.backends.alignment.nemo_aligner.prediction import predict
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
    """Return (row of the prompt, answer) of requests of several lengths."""
    answers = [("a" * (number % 13)) + (" hound" if number % 3 else " cat") for number in range(NUM_REQUESTS)]
    return [(ROWS[number % len(ROWS)], answer) for number, answer in enumerate(answers)]


@pytest.mark.parametrize("rules", [[], RULES], ids=["alone", "with rules"])
@pytest.mark.parametrize("kind", ["regression", "ranking"])
def test_the_rewards_are_those_of_a_direct_call(
    kind: str, rules: list[dict[str, Any]], border: Border, tmp_path: Path
) -> None:
    reward = ModelReward(published(kind, border, tmp_path), WEIGHT, ATTRIBUTE_WEIGHTS if kind == "regression" else None)
    context = TaskContext("rl", tmp_path / "work", Parallel(), "cpu", 1, *quiet())
    context.work_dir.mkdir()
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    texts = [row["text"] + answer + STOP for row, answer in requests()]
    sizes = [len(tokenizer.encode(answer + STOP, add_special_tokens=False).ids) for _, answer in requests()]
    for text, (row, answer) in zip(texts, requests(), strict=True):  # a server gets the tokens of both parts
        parts = [tokenizer.encode(part, add_special_tokens=False).ids for part in (row["text"], answer + STOP)]
        assert tokenizer.encode(text, add_special_tokens=False).ids == parts[0] + parts[1]
    nemo = reward.model_dir / "nemo"
    outputs = predict(nemo, reward.model_dir / "nemo.tokenizer", texts, 7, context)
    weights = reward.attribute_weights or [1.0]
    expected = [WEIGHT * sum(w * x for w, x in zip(weights, row, strict=True)) for row in outputs]
    by_rule = [RewardRule(**rule) for rule in rules]
    functions = make_rules(by_rule)
    for index, (row, answer) in enumerate(requests()):
        if rules:
            (more,) = rewards(by_rule, functions, [Answer(row["text"], answer, sizes[index], row)])
            expected[index] += more
    servers = [server(tmp_path / "rules", rules, _client(reward)), _reward_model_server(reward, 8, context)]
    with running(servers, 1, StopRequest(), on_cpu=True) as started:
        found = ask([[(row["text"], answer + STOP)] for row, answer in requests()], dict(started.variables))
        several = ask([[(row["text"], answer + STOP) for row, answer in requests()[:20]]], dict(started.variables))
        malformed = ask([[("Not a prompt of the training", "a")]], dict(started.variables))
        started.watch()
    assert [one[0] for one in found] == pytest.approx(expected, abs=1e-5)
    assert several[0] == pytest.approx(expected[:20], abs=1e-5)
    assert json.dumps(malformed) == "[[NaN]]"
    assert max(expected) - min(expected) > 1e-3
