"""Parts of our scripts over NeMo-Aligner's trainers, without a model: starts, stops, and a critic that fails."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.backends.alignment.nemo_aligner.environment import ENTRY, aligner_python

SCRIPT = """
import json, os, sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import cpu
cpu.enable()
import torch
import dpo, ppo, rollouts, training

work = Path(sys.argv[2])
rank = int(os.fork() == 0)  # two ranks, with one import of NeMo
meet = f"file://{work / 'meet'}"
torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
found = {}

def outcome(function):
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

# The critic's training.
ppo.Measured._run_inference = lambda self: "answers"
ppo.PPOTrainer.save = lambda self: self.rm_critic.save().result()
ppo.RemoteGPTRMCriticClient.__post_init__ = lambda self: None
ppo.RemoteGPTRMCriticClient.train = lambda self, data: data if rank == 0 else None
for name, error in (("trained", None), ("failed", ValueError("no memory"))):
    future = Future()
    future.set_exception(error) if error else future.set_result(None)
    saved = []
    client = ppo.Client(None)
    client.save = lambda: (saved.append(name), SimpleNamespace(result=lambda: None))[1]
    trainer = object.__new__(ppo.Trainer)
    trainer.rm_critic = client
    client.train(future)
    found[f"{name}.answers"] = outcome(trainer._run_inference)
    found[f"{name}.again"] = outcome(trainer._run_inference)
    client.train(future)
    found[f"{name}.save"] = [outcome(trainer.save), saved]

# The first measurement of a training on rewards, and a stop before it.
class Started:
    def __init__(self):
        self.loaded, self.timer = [], SimpleNamespace(consume_durations=lambda: None)
    def load_state_dict(self, progress):
        self.loaded.append(progress)
    def run_validation(self):
        return {"table": {}, "rewards": 0.5}

for name, progress, is_stopped in (("new", None, False), ("stopped", None, True), ("resumed", {"step": 3}, True)):
    file = work / f"{name}.{rank}"
    if is_stopped and rank == 0:  # the other rank may not see the file yet
        file.touch()
    logged = []
    loggers = SimpleNamespace(log_metrics=lambda metrics, step, prefix: logged.append([metrics, step, prefix]))
    trainer = Started()
    goes_on = rollouts.begin(trainer, progress, loggers, training.StopTimer(file))
    found[name] = [goes_on, trainer.loaded, logged]

# Validations without a batch.
for progress in (None, {"step": 3}):
    trainer = SimpleNamespace(limit_val_batches=0)
    found.setdefault("no batches", []).append(outcome(lambda: training.begin(trainer, progress, None)))

# Lengths of pairs.
class Sampler(list):
    drop_last, total_samples, global_batch_size = True, 8, 4

config = SimpleNamespace(limit_val_batches=1.0, val_check_interval=1, max_epochs=1, get=lambda key, default: default)
data = SimpleNamespace(
    reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, pad_length_to_multiple_of=96
)
model = SimpleNamespace(cfg=type("Config", (dict,), {"data": data})(), tokenizer=SimpleNamespace(eos_id=0))
names = ("optimizer", "scheduler", "test_dataloader", "logger", "ckpt_callback", "run_timer")
loaders = {"train_dataloader": SimpleNamespace(batch_sampler=Sampler()), "val_dataloader": [1]}
trainer = dpo._trainer(cfg=config, model=model, **loaders, **dict.fromkeys(names))
found["multiple"] = trainer.pad_seq_length_to_mult

(work / f"found.{rank}.json").write_text(json.dumps(found))
torch.distributed.barrier()
if rank == 0:
    os.wait()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two ranks has found."""
    work: Path = tmp_path_factory.mktemp("parts")
    command = [str(aligner_python()), "-c", SCRIPT, str(ENTRY), str(work)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((work / f"found.{rank}.json").read_text()) for rank in range(2)]


def test_a_critic_that_cannot_be_trained_ends_the_training_on_every_rank(found: list[dict[str, Any]]) -> None:
    error = "RuntimeError: the critic could not be trained: ValueError: no memory"
    for rank in found:
        assert (rank["trained.answers"], rank["trained.again"]) == ("answers", "answers")
        assert rank["trained.save"] == [None, ["trained"]]
        assert (rank["failed.answers"], rank["failed.again"]) == (error, "answers")
        assert rank["failed.save"] == [error, []], "neither the critic nor the actor is saved"


def test_a_training_on_rewards_that_is_stopped_before_its_first_step_does_not_take_it(
    found: list[dict[str, Any]],
) -> None:
    """It resumed after that step, and had no measurement of the start."""
    for rank in found:
        assert rank["new"] == [True, [], [[{"rewards": 0.5}, 0, "val_rollouts/"]]]
        assert rank["stopped"] == [False, [], []]
        assert rank["resumed"] == [True, [{"step": 3}], []]


def test_validations_without_a_batch_are_refused_before_the_first(found: list[dict[str, Any]]) -> None:
    (one, other), _ = (rank["no batches"] for rank in found)
    assert one == other
    assert one.startswith("RuntimeError: limit_val_batches leaves none of the held-out batches")


def test_pairs_are_padded_to_the_multiple_of_their_key(found: list[dict[str, Any]]) -> None:
    assert found[0]["multiple"] == 96
