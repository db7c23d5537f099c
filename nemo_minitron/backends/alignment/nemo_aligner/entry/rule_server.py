"""Server of rewards by rules, with the interface of NeMo-Aligner's server of a reward model.

It decodes answers and finds the row of their prompt; a process of nemo-minitron's own environment computes the rewards.
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
"""Name of the model that NeMo-Aligner's client calls."""


def serve(task: Task) -> dict[str, Any]:
    """Serve the rewards of the rows of `prompts` until the process ends."""
    import triton_socket

    environment = _runner_environment(task)
    triton_socket.prepare()
    from pytriton.decorators import batch
    from pytriton.model_config import Tensor

    rules = _Rules(task, environment)

    def infer(**inputs: Any) -> dict[str, Any]:
        return {"rewards": rules.rewards(inputs["tokens"], inputs["sequence_lengths"])}

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


class _Rules:
    """The process that computes rewards, and the rows of the prompts by their tokens."""

    def __init__(self, task: Task, environment: Mapping[str, str]) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(Path(task["tokenizer"]) / "tokenizer.json"))
        self._stop = str(task["stop"])
        self._rows: dict[tuple[int, ...], dict[str, Any]] = {}
        for file in task["prompts"]:
            for line in Path(file).read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._rows[tuple(self._tokenizer.encode(row["text"], add_special_tokens=False).ids)] = row
        self._lengths = sorted({len(ids) for ids in self._rows}, reverse=True)
        self._process = subprocess.Popen(
            task["evaluator"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._lock = threading.Lock()

    def rewards(self, tokens: Any, lengths: Any) -> Any:
        """Return the rewards of a batch, shape [B, 1]; `tokens` is [B, S], `lengths` [B, 1].

        A text that does not begin with a prompt gets NaN: Triton joins requests, so an error would fail others as well.
        """
        found = [self._answer(row[: int(length)]) for row, length in zip(tokens, lengths[:, 0], strict=True)]
        known = [index for index, answer in enumerate(found) if answer is not None]
        out = np.full((len(found), 1), np.nan, dtype=np.float32)
        if known:
            out[known, 0] = self._evaluated([found[index] for index in known])
        return out

    def _evaluated(self, answers: Sequence[Any]) -> Any:
        """Return the rewards of answers to known prompts."""
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
                return {"answer": text.removesuffix(self._stop), "num_tokens": len(answer), "row": row}
        print(f"A request of {len(ids)} tokens does not begin with one of the prompts.", flush=True)
        return None
