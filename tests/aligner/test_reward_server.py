"""The server of rewards by rules: it answers as a direct call does, whoever asks at the same time, and ends whole."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_minitron.backends.alignment.nemo_aligner.environment import ENTRY, aligner_python
from nemo_minitron.backends.alignment.nemo_aligner.servers import (
    SOCKETS_VARIABLE,
    ServerTask,
    changed_variables,
    running,
)
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.evaluation.rewards import Answer, make_rules, rewards
from nemo_minitron.processes.same_code import START
from nemo_minitron.schema.rewards import RewardRule
from nemo_minitron.system.interrupts import StopRequest
from tests.conftest import REPO
from tests.support.aligner import require_aligner

TOKENIZER = REPO / "nemo_minitron/toy/model"
RULES = [
    {"rule": "length", "unit": "characters", "target": 8, "weight": 2.0},
    {"rule": "length", "unit": "tokens", "target": 9},
    {"rule": "contains", "text": "hound", "weight": -0.5},
]
ROWS = [{"text": f"Question {number}?\nAnswer: ", "reference": str(number)} for number in range(20)]
STOP = "<end>"
NUM_REQUESTS, NUM_THREADS = 200, 16
CLIENT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, sys.argv[1])
import triton_socket
triton_socket.prepare()
import numpy as np
from pytriton.client import ModelClient
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")

def ask(texts):
    # As the actor does: the tokens of the answer come after those of the prompt.
    ids = [sum((tokenizer.encode(part, add_special_tokens=False).ids for part in parts), []) for parts in texts]
    width = max(map(len, ids)) + 3
    tokens = np.array([row + [7] * (width - len(row)) for row in ids])
    lengths = np.array([[len(row)] for row in ids])
    try:
        with ModelClient("http://localhost:" + sys.argv[4], "reward_model", init_timeout_s=60) as client:
            return client.infer_batch(tokens=tokens, sequence_lengths=lengths)["rewards"][:, 0].tolist()
    except Exception as error:
        return str(error)

requests = json.load(sys.stdin)
with ThreadPoolExecutor(int(sys.argv[3])) as pool:
    json.dump(list(pool.map(ask, requests)), sys.stdout)
"""


def server(work: Path, rules: list[dict[str, Any]], reward_model: dict[str, Any] | None = None) -> ServerTask:
    work.mkdir(parents=True, exist_ok=True)
    (work / "rules.json").write_text(json.dumps(rules))
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {
        "prompts": [str(work / "prompts.jsonl")],
        "tokenizer": str(TOKENIZER),
        "ends": [STOP],
        "evaluator": [sys.executable, str(START), "rewards", str(work / "rules.json")] if rules else [],
        "reward_model": reward_model,
        "changed_variables": changed_variables(on_cpu=True),
    }
    return ServerTask("rule_server", 1, task, work)


def ask(requests: list[list[tuple[str, str]]], folder: dict[str, str], number: int = 1) -> list[Any]:
    """Return the rewards of each request from the server with this number, or the text of its error."""
    command = [str(aligner_python()), "-c", CLIENT, str(ENTRY), str(TOKENIZER), str(NUM_THREADS), str(number)]
    done = subprocess.run(
        command, input=json.dumps(requests), env={**os.environ, **folder}, capture_output=True, text=True, check=True
    )
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def started(tmp_path: Path) -> Iterator[dict[str, str]]:
    require_aligner()
    with running([server(tmp_path, RULES)], 1, StopRequest(), on_cpu=True) as servers:
        yield dict(servers.variables)
        servers.watch()


def test_concurrent_and_malformed_requests_get_what_a_direct_call_gives(started: dict[str, str]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    answers = [("a" * (number % 13)) + (" hound" if number % 3 else "") for number in range(NUM_REQUESTS)]
    requests, expected = [], []
    rules = [RewardRule(**rule) for rule in RULES]
    for number, answer in enumerate(answers):
        row, end = ROWS[number % len(ROWS)], STOP if number % 2 else ""
        if number % 10 == 9:
            requests.append([("Not a prompt of the training", answer)])
            expected.append(None)
            continue
        requests.append([(row["text"], answer + end)])
        num_tokens = len(tokenizer.encode(answer + end, add_special_tokens=False).ids)
        expected += rewards(rules, make_rules(rules), [Answer(row["text"], answer, num_tokens, row)])
    for found, wanted in zip(ask(requests, started), expected, strict=True):
        assert found == pytest.approx([math.nan if wanted is None else wanted], abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("victim", [pytest.param("tritonserver", marks=pytest.mark.slow), "python"])
def test_a_server_killed_during_requests_is_reported_and_the_next_one_answers_all(victim: str, tmp_path: Path) -> None:
    require_aligner()
    called = tmp_path / "called"
    body = f"open({str(called)!r}, 'w').close(); time.sleep(0.2); return len(answer)"
    (tmp_path / "slow.py").write_text(f"import time\n\ndef reward(prompt, answer, row):\n    {body}\n")
    rules = [{"rule": "function", "function": "slow:reward"}]
    requests = [[(ROWS[number % len(ROWS)]["text"], "a" * (number % 5))] for number in range(NUM_THREADS)]
    reported = pytest.raises(EnvironmentProblem, match=r"rule_server ended with code .* while the training needed it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with ThreadPoolExecutor(1) as pool:
            with reported, running([server(tmp_path / "first", rules)], 1, StopRequest(), on_cpu=True) as servers:
                before = pool.submit(ask, requests, dict(servers.variables))
                until(called.exists)
                _process_of_the_server(tmp_path / "first", victim).kill()
                until(lambda: servers.watch())  # raises
            lost = [found for found in before.result(200) if isinstance(found, str)]
        assert lost, "the kill came after the last request"
        with running([server(tmp_path / "second", rules)], 1, StopRequest(), on_cpu=True) as servers:
            found = ask(requests, dict(servers.variables))
    assert found == [[float(number % 5)] for number in range(NUM_THREADS)]


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _process_of_the_server(work: Path, what: str) -> psutil.Process:
    """Return Triton, or the Python program that starts it."""
    family = psutil.Process().children(recursive=True)
    if what == "tritonserver":
        return next(one for one in family if one.name() == what)
    return next(one for one in family if str(work / "task.json") in one.cmdline())


def test_no_port_is_open_and_the_sockets_are_private(started: dict[str, str]) -> None:
    folder = Path(started[SOCKETS_VARIABLE])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    family = psutil.Process().children(recursive=True)
    names = {one.name() for one in family}
    assert "tritonserver" in names
    listening = [c for one in family for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == []


def test_all_processes_and_files_are_gone_afterwards(tmp_path: Path) -> None:
    require_aligner()
    before = {path.name for path in Path("/dev/shm").iterdir()}
    others = set(psutil.Process().children(recursive=True))
    with running([server(tmp_path, RULES)], 1, StopRequest(), on_cpu=True) as servers:
        folder = Path(servers.variables[SOCKETS_VARIABLE])
        family = set(psutil.Process().children(recursive=True)) - others
    assert family
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not folder.exists()
    assert not {path.name for path in Path("/dev/shm").iterdir() if "pytrtion" in path.name} - before


def test_a_server_that_cannot_start_reports_why(tmp_path: Path) -> None:
    require_aligner()
    task = server(tmp_path, RULES)
    broken = ServerTask(task.name, 1, {**task.task, "tokenizer": str(tmp_path / "missing")}, tmp_path)
    reported = pytest.raises(EnvironmentProblem, match="rule_server ended with code 1")
    with reported, running([broken], 1, StopRequest(), on_cpu=True):
        pass
