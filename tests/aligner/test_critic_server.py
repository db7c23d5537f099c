"""The server of PPO's critic: values, training, checkpoints, and going back by one checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_minitron.backends.alignment.nemo_aligner.config import complete_config
from nemo_minitron.backends.alignment.nemo_aligner.environment import ENTRY, aligner_python
from nemo_minitron.backends.alignment.nemo_aligner.rollout_keys import critic_keys
from nemo_minitron.backends.alignment.nemo_aligner.servers import ServerTask, running
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.system.interrupts import StopRequest
from tests.conftest import REPO
from tests.support.aligner import Border, require_aligner
from tests.unit.test_rollout_rules import CRITIC, rollouts

pytestmark = pytest.mark.slow

CLIENT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import triton_socket
triton_socket.prepare()
import numpy as np
from pytriton.client import ModelClient

tokens = np.random.default_rng(0).integers(0, 500, (8, 20))
mask = np.zeros((8, 19), np.float32)
mask[:, 5:] = 1

def values():
    with ModelClient("http://localhost:2", "critic_infer") as client:
        return client.infer_batch(tokens=tokens, sequence_lengths=np.full((8, 1), 20))["values"]

def train():
    with ModelClient("http://localhost:2", "critic_train") as client:
        before = np.zeros_like(mask)
        found = client.infer_sample(tokens=tokens, returns=np.ones_like(mask), prev_values=before, mask=mask)
    return float(found["loss_mean"][0])

def save():
    with ModelClient("http://localhost:2", "critic_save") as client:
        client.infer_sample(dummy_var=np.array([0]))

out = {"values": [values().tolist()], "losses": []}
for step in range(int(sys.argv[2])):
    out["losses"].append(train())
    out["values"].append(values().tolist())
    save()
print(json.dumps(out))
"""


def serve(work: Path, nemo: Path, step: int, num_steps: int) -> dict[str, list[float]]:
    """Start the server from its checkpoint of `step`, and train it `num_steps` times, with a checkpoint at each."""
    settings = replace(rollouts(CRITIC, work), max_seq_len_tokens=64)
    config = complete_config("critic", critic_keys(settings, CRITIC, nemo, work), {}, on_cpu=True, where="test")
    task = {"config": config, "nemo": str(nemo), "base_model_only": True, "step": step}
    with running([ServerTask("critic_server", 2, task, work)], 1, StopRequest(), on_cpu=True) as servers:
        command = [str(aligner_python()), "-c", CLIENT, str(ENTRY), str(num_steps)]
        environment = {**os.environ, **servers.variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_the_critic_learns_and_goes_back_to_the_step_of_the_actor(tmp_path: Path) -> None:
    require_aligner()
    border = Border(REPO / "nemo_minitron/toy/model", tmp_path / "border", seq_len_tokens=64).cross()
    work = tmp_path / "critic"
    first = serve(work, border.nemo, step=0, num_steps=3)
    assert first["losses"][-1] < first["losses"][0]
    # The newest checkpoint is of step 3; the actor resumes with the one before.
    second = serve(work, border.nemo, step=2, num_steps=0)
    for found, expected in zip(second["values"][0], first["values"][2], strict=True):  # type: ignore[call-overload]
        assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(EnvironmentProblem, match="resumes with the critic of step 7"):
        serve(work, border.nemo, step=7, num_steps=0)
