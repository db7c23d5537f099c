"""The trainer of REINFORCE without a model: the order of the prompts, and the metrics of held-out answers."""

from __future__ import annotations

import json
import math
import os
import subprocess
from typing import Any

import pytest

from nemo_minitron.backends.alignment.nemo_aligner.environment import ENTRY, aligner_python

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import cpu
cpu.enable()
import torch
from types import SimpleNamespace
from nemo.collections.nlp.data.language_modeling.megatron.data_samplers import MegatronPretrainingRandomSampler
from nemo_aligner.utils.distributed import ScopedTimer
from reinforce import Trainer

PROMPTS, PER_STEP, MICRO_BATCH, ANSWERS = 24, 8, 4, 3

class Fake(Trainer):
    def __init__(self, progress):
        nothing = lambda: None
        tokenizer = SimpleNamespace(ids_to_text=str)
        self.model = SimpleNamespace(prepare_for_inference=nothing, finish_inference=nothing, tokenizer=tokenizer)
        self.cfg = SimpleNamespace(num_rollouts_per_prompt=ANSWERS)
        self.timer = ScopedTimer(reduction="mean", buffer_size=1)
        self.train_dataloader_builder = None
        self.consumed_samples = progress

    def _run_inference(self, builder, consumed_samples, is_validation):
        sampler = iter(MegatronPretrainingRandomSampler(PROMPTS, consumed_samples, MICRO_BATCH, 0, 1, True, PER_STEP))
        seen.extend(index for _ in range(PER_STEP // MICRO_BATCH) for index in next(sampler))
        return {}, {"rollout_size": PER_STEP * ANSWERS}

    def generate_reinforce_data(self, batch):
        return {}, {}

seen, progress = [], 0
for step in range(2 * PROMPTS // PER_STEP):
    trainer = Fake(progress)
    _, metrics, _ = trainer.generate_rollouts()
    assert metrics["consumed_samples"] == trainer.consumed_samples
    progress = trainer.consumed_samples

trainer.answers, trainer.step, trainer._is_validation = SimpleNamespace(write=lambda *_: None), 0, True
metrics = []
for rewards in ([0.5], [0.0, 1.0]):
    ones = torch.ones(len(rewards), dtype=torch.long)
    batch = {"prompt_lengths": ones, "response_lengths": 2 * ones, "response_tokens": torch.ones(len(rewards), 3)}
    metrics.append(trainer.compute_rollout_metrics({**batch, "rewards": torch.tensor(rewards), "is_end": ones == 1}))
print(json.dumps({"prompts": seen, "metrics": metrics}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [str(aligner_python()), "-c", SCRIPT, str(ENTRY)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    out: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return out


def test_every_prompt_of_an_epoch_is_answered_once(found: dict[str, Any]) -> None:
    seen = found["prompts"]
    for epoch in (seen[:24], seen[24:]):
        assert sorted(epoch) == list(range(24))
    assert seen[:24] != seen[24:]


def test_a_single_held_out_answer_has_no_standard_error(found: dict[str, Any]) -> None:
    one, two = found["metrics"]
    assert one["rewards"] == 0.5
    assert "rewards_se" not in one, "NaN would not be JSON"
    assert two["rewards_se"] == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
