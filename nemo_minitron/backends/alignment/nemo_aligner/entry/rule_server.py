"""Server of the summed rewards of rules and a reward model, with the interface of NeMo-Aligner's reward-model server.

It decodes answers and finds the row of their prompt; a process of nemo-minitron's own environment computes the rewards
by rules. The reward model has a server of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from task import Task

REWARD_MODEL = "reward_model"
"""Name under which both servers offer their rewards; NeMo-Aligner's client calls it."""
TIMEOUT_S = 600_000.0
"""Timeout of a reward: that of NeMo-Aligner's client. If the other server ends, the runner ends this process."""


def serve(task: Task) -> dict[str, Any]:
    """Serve the rewards of the rows of `prompts` until the process ends."""
    import triton_socket

    environment = _runner_environment(task)
    triton_socket.prepare()
    from pytriton.decorators import batch
    from pytriton.model_config import Tensor

    rewards = _Rewards(task, environment)

    def infer(**inputs: Any) -> dict[str, Any]:
        return {"rewards": rewards.of(inputs["tokens"], inputs["sequence_lengths"])}

    inputs = tuple(Tensor(name=name, shape=(-1,), dtype=np.int64) for name in ("tokens", "sequence_lengths"))
    outputs = (Tensor(name="rewards", shape=(1,), dtype=np.float32),)
    ready = Path(task["work_dir"]) / task["ready_file"]
    triton_socket.serve(task["number"], REWARD_MODEL, batch(infer), inputs, outputs, ready)
    return {}


def _runner_environment(task: Task) -> dict[str, str]:
    """Return the variables of the runner: those of this process, without what was changed for NeMo-Aligner."""
    changed = task["changed_variables"]
    kept = {name: value for name, value in os.environ.items() if name not in changed}
    return {**kept, **{name: value for name, value in changed.items() if value is not None}}


class _Rewards:
    """The process that computes rewards by rules, the reward model, and the rows of the prompts by their tokens."""

    def __init__(self, task: Task, environment: Mapping[str, str]) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(Path(task["tokenizer"]) / "tokenizer.json"))
        self._ends: list[str] = task["ends"]
        self._rows: dict[tuple[int, ...], dict[str, Any]] = {}
        for file in task["prompts"]:
            for line in Path(file).read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._rows[tuple(self._tokenizer.encode(row["text"], add_special_tokens=False).ids)] = row
        self._lengths = sorted({len(ids) for ids in self._rows}, reverse=True)
        command: list[str] = task["evaluator"]
        self._process = (
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            if command
            else None
        )
        self._lock = threading.Lock()
        self._model: Mapping[str, Any] | None = task["reward_model"]

    def of(self, tokens: Any, lengths: Any) -> Any:
        """Return the rewards of a batch, shape [B, 1]; `tokens` is [B, S], `lengths` [B, 1].

        A text that does not begin with a prompt, or is shorter than its length, gets NaN: Triton joins requests, so an
        error would fail others as well.
        """
        fits = lengths[:, 0] <= tokens.shape[1]
        found = [
            self._answer(row[: int(length)]) if fit else None
            for row, length, fit in zip(tokens, lengths[:, 0], fits, strict=True)
        ]
        known = [index for index, answer in enumerate(found) if answer is not None]
        out = np.full((len(found), 1), np.nan, dtype=np.float32)
        if known:
            by_rules = self._by_rules([found[index] for index in known])
            out[known, 0] = by_rules + self._by_model(tokens[known], lengths[known])
        return out

    def _by_model(self, tokens: Any, lengths: Any) -> Any:
        """Return the weighted rewards of the reward model, [B]; 0 without one."""
        if self._model is None:
            return 0.0
        from pytriton.client import ModelClient

        url = f"http://localhost:{self._model['number']}"
        # A client of its own for each request, because its connections belong to the thread that opens them.
        with ModelClient(url, REWARD_MODEL, inference_timeout_s=TIMEOUT_S) as client:
            found = client.infer_batch(tokens=tokens, sequence_lengths=lengths)["rewards"]
        return self._model["weight"] * found[:, 0]

    def _by_rules(self, answers: Sequence[Any]) -> Any:
        """Return the rewards of answers to known prompts by rules, [B]; 0 without rules."""
        if self._process is None:
            return 0.0
        with self._lock:
            stdin, stdout = self._process.stdin, self._process.stdout
            assert stdin is not None
            assert stdout is not None
            stdin.write(json.dumps(answers).encode() + b"\n")
            stdin.flush()
            line = stdout.readline()
        if not line:
            raise RuntimeError(f"the process that computes rewards ended with code {self._process.wait()}")
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return np.asarray(found["rewards"], dtype=np.float32)

    def _answer(self, tokens: Sequence[int]) -> dict[str, Any] | None:
        """Return the answer with the row of its prompt; None if the tokens do not begin with a prompt."""
        ids = [int(token) for token in tokens]
        for length in self._lengths:
            row = self._rows.get(tuple(ids[:length]))
            if row is not None and len(ids) >= length:
                answer = ids[length:]
                text = self._tokenizer.decode(answer, skip_special_tokens=False)
                end = next((end for end in self._ends if text.endswith(end)), "")
                return {"answer": text.removesuffix(end), "num_tokens": len(answer), "row": row}
        print(f"A request of {len(ids)} tokens does not begin with one of the prompts.", flush=True)
        return None
