"""Megatron's logits of a few tokens, for the comparison with another implementation of the same model.

`python nemo_minitron/start probe ORDER.json` computes them in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_minitron.backends.megatron.model.build import build_model
from nemo_minitron.backends.megatron.model.forward import evaluating, model_logits
from nemo_minitron.backends.megatron.model.weights import load_weights
from nemo_minitron.backends.megatron.runtime.meeting import MEETING_VARIABLE
from nemo_minitron.backends.megatron.runtime.session import Session, open_session
from nemo_minitron.errors import ProcessesDied
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.processes.same_code import SAFE_PATH, START
from nemo_minitron.schema.execution import Parallel

_WORLD = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    MEETING_VARIABLE,
)
"""What an agent tells its ranks."""


@dataclass(frozen=True)
class Probe:
    """Token ids and their positions, which may have gaps, and how many of the model's layers to run."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    num_layers: int


@dataclass(frozen=True)
class Answer:
    """What Megatron makes of a probe."""

    logits: Tensor
    """[tokens, vocabulary] in fp32."""
    rope_frequencies: Tensor
    """[rotated channels / 2], radians for each position."""


def ask(model_dir: Path, probe: Probe, session: Session | None) -> Answer:
    """Megatron's answer in fp32 on the CPU, by one process, whatever the layout of `session`.

    Raises:
        CheckpointError: see `Checkpoint.open`.
        ProcessesDied: a process of its own was needed, and it failed.
    """
    if session is not None and session.world_size == 1 and not session.on_gpu:
        return answer(model_dir, probe, session)
    if session is not None or dist.is_initialized() or any(name in os.environ for name in _WORLD):
        return _ask_child(model_dir, probe)
    with torch.random.fork_rng(devices=[]), open_session(Parallel(), device="cpu") as own:
        return answer(model_dir, probe, own)


@torch.no_grad()
def answer(model_dir: Path, probe: Probe, session: Session) -> Answer:
    """The same in an open session of one process on the CPU."""
    whole = Checkpoint.open(model_dir)
    checkpoint = replace(whole, shape=whole.shape.resized(num_layers=probe.num_layers))
    model = build_model(checkpoint.shape, session, precision="fp32", seq_len_tokens=len(probe.tokens))
    load_weights(model, checkpoint, session)
    _place(model.rotary_pos_emb, torch.tensor(probe.positions))
    # Megatron compiles an activation with the machine's C++ compiler, which takes longer than this whole comparison.
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        logits = model_logits(model, {"tokens": torch.tensor([probe.tokens])})[0]
    return Answer(logits[:, : checkpoint.shape.vocab_size].float(), model.rotary_pos_emb.inv_freq.float())


def _place(rotary: torch.nn.Module, positions: Tensor) -> None:
    """Give the tokens these positions: Megatron counts them from 0 without gaps."""
    longest = int(positions.max()) + 1
    rotary.register_forward_pre_hook(lambda _, args: (longest, *args[1:]))
    rotary.register_forward_hook(lambda _, __, angles: angles[positions])


def _ask_child(model_dir: Path, probe: Probe) -> Answer:
    environment = {key: value for key, value in os.environ.items() if key not in _WORLD}
    environment |= SAFE_PATH
    with tempfile.TemporaryDirectory() as folder:
        order, out = Path(folder) / "order.json", Path(folder) / "answer.safetensors"
        order.write_text(json.dumps({"model": str(model_dir.resolve()), "probe": asdict(probe), "out": str(out)}))
        command = [sys.executable, str(START), "probe", str(order)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not out.is_file():
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
            raise ProcessesDied(
                f"Megatron's logits could not be computed (exit code {done.returncode}): {last.strip()}",
                where=str(model_dir),
                next_step="Is there enough memory? Run the same command again.",
            )
        return Answer(**load_file(out))


def main(order_file: Path) -> None:
    """Answer what `ask` has left in the file."""
    order: dict[str, Any] = json.loads(order_file.read_text())
    told = order["probe"]
    probe = Probe(tuple(told["tokens"]), tuple(told["positions"]), told["num_layers"])
    with open_session(Parallel(), device="cpu") as session:
        found = answer(Path(order["model"]), probe, session)
    save_file({name: tensor.contiguous() for name, tensor in vars(found).items()}, order["out"])
