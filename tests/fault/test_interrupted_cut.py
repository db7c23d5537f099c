"""kill -9 while a checkpoint is being cut: nothing is published, and the same command finishes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from nemo_minitron.families import parameters, read_shape, tensor_shape
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.hf.checkpoint_writer import CheckpointWriter, Planned

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}
RECIPE = """
name: cut
stages:
  teacher: {{kind: adopt, path: {teacher}}}
  select: {{method: random, inputs: {{scores: null}}, target: {{hidden_size: 896, ffn_hidden_size: 3072}}}}
  prune: {{}}
execution: {{run_root: {root}, device: cpu}}
"""


def _teacher(folder: Path) -> Path:
    """390 MB of random bf16: cutting it takes long enough to be interrupted."""
    folder.mkdir()
    shape = read_shape(CONFIG)
    rows = [(parameter.hf, tensor_shape(shape, parameter.row)) for parameter in parameters(shape)]
    writer = CheckpointWriter(folder, CONFIG, [Planned(name, dims, "BF16") for name, dims in rows])
    for name, dims in rows:
        writer.add(name, torch.randn(dims).bfloat16())
    writer.close()
    return folder


def test_a_killed_cut_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    recipe, root = tmp_path / "cut.yaml", tmp_path / "runs"
    recipe.write_text(RECIPE.format(teacher=_teacher(tmp_path / "teacher"), root=root))
    command = [sys.executable, "-m", "nemo_minitron", "run", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as output:
        first = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    deadline = time.monotonic() + 120
    while not any(file.stat().st_size for file in root.glob("cut/.partial-prune*/*.safetensors")):
        assert first.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (root / "cut/prune").exists()
    assert not list(root.glob("cut/.partial-prune*/config.json")), "it was killed too late to tell anything"

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert not list(root.glob("cut/.partial-*"))
    student = Checkpoint.open(root / "cut/prune")
    assert (student.shape.hidden_size, student.shape.ffn_hidden_size) == (896, 3072)
    plan = json.loads((root / "cut/select/prune_plan.json").read_text())
    assert plan["method"] == "random"
