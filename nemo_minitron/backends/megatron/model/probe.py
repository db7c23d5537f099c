"""Compute Megatron's logits of a few tokens, to compare them with another implementation of the same model.

`python nemo_minitron/start probe REQUEST.json` computes them in a separate process.
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
from nemo_minitron.backends.megatron.runtime.rendezvous import RENDEZVOUS_FOLDER_VARIABLE
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
    RENDEZVOUS_FOLDER_VARIABLE,
)
"""Environment variables that an agent sets for its ranks."""


@dataclass(frozen=True)
class Probe:
    """Token ids, their positions (which may have gaps), and the number of layers to run."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    num_layers: int


@dataclass(frozen=True)
class ProbeResult:
    """Megatron's result for a probe."""

    logits: Tensor
    """[tokens, vocabulary] in fp32."""
    rope_frequencies: Tensor
    """[rotated channels / 2], radians for each position."""


def run_probe(model_dir: Path, probe: Probe, session: Session | None) -> ProbeResult:
    """Run a probe in fp32 on the CPU in one process, independent of the layout of `session`.

    Raises:
        CheckpointError: see `Checkpoint.open`.
        ProcessesDied: a separate process was needed, and it failed.
    """
    if session is not None and session.world_size == 1 and not session.on_gpu:
        return run_probe_in_session(model_dir, probe, session)
    if session is not None or dist.is_initialized() or any(name in os.environ for name in _WORLD):
        return _run_probe_in_child(model_dir, probe)
    with torch.random.fork_rng(devices=[]), open_session(Parallel(), device="cpu") as own:
        return run_probe_in_session(model_dir, probe, own)


@torch.no_grad()
def run_probe_in_session(model_dir: Path, probe: Probe, session: Session) -> ProbeResult:
    """Run a probe in an open CPU session of one process."""
    whole = Checkpoint.open(model_dir)
    checkpoint = replace(whole, shape=whole.shape.resized(num_layers=probe.num_layers))
    model = build_model(checkpoint.shape, session, precision="fp32", seq_len_tokens=len(probe.tokens))
    load_weights(model, checkpoint, session)
    _place(model.rotary_pos_emb, torch.tensor(probe.positions))
    # Megatron would compile an activation, which takes longer than the whole comparison.
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        logits = model_logits(model, {"tokens": torch.tensor([probe.tokens])})[0]
    return ProbeResult(logits[:, : checkpoint.shape.vocab_size].float(), model.rotary_pos_emb.inv_freq.float())


def _place(rotary: torch.nn.Module, positions: Tensor) -> None:
    """Set the tokens' positions; Megatron numbers them from 0 without gaps."""
    longest = int(positions.max()) + 1
    rotary.register_forward_pre_hook(lambda _, args: (longest, *args[1:]))
    rotary.register_forward_hook(lambda _, __, angles: angles[positions])


def _run_probe_in_child(model_dir: Path, probe: Probe) -> ProbeResult:
    environment = {key: value for key, value in os.environ.items() if key not in _WORLD}
    environment |= SAFE_PATH
    with tempfile.TemporaryDirectory() as folder:
        request, out = Path(folder) / "request.json", Path(folder) / "result.safetensors"
        request.write_text(json.dumps({"model": str(model_dir.resolve()), "probe": asdict(probe), "out": str(out)}))
        command = [sys.executable, str(START), "probe", str(request)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not out.is_file():
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
            raise ProcessesDied(
                f"Megatron's logits could not be computed (exit code {done.returncode}): {last.strip()}",
                where=str(model_dir),
                next_step="Check that there is enough memory, and run the same command again.",
            )
        return ProbeResult(**load_file(out))


def main(request_file: Path) -> None:
    """Run the probe that `run_probe` has written to the file."""
    request: dict[str, Any] = json.loads(request_file.read_text())
    fields = request["probe"]
    probe = Probe(tuple(fields["tokens"]), tuple(fields["positions"]), fields["num_layers"])
    with open_session(Parallel(), device="cpu") as session:
        found = run_probe_in_session(Path(request["model"]), probe, session)
    save_file({name: tensor.contiguous() for name, tensor in vars(found).items()}, request["out"])
