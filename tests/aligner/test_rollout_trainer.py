"""REINFORCE answers every prompt of an epoch once, also after it has resumed."""

from __future__ import annotations

import json
import os
import subprocess

from nemo_minitron.backends.alignment.nemo_aligner.environment import ENTRY, aligner_python

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import cpu
cpu.enable()
from types import SimpleNamespace
from nemo.collections.nlp.data.language_modeling.megatron.data_samplers import MegatronPretrainingRandomSampler
from nemo_aligner.utils.distributed import ScopedTimer
from reinforce import Trainer

PROMPTS, PER_STEP, MICRO_BATCH, ANSWERS = 24, 8, 4, 3

class Fake(Trainer):
    def __init__(self, progress):
        nothing = lambda: None
        self.model = SimpleNamespace(prepare_for_inference=nothing, finish_inference=nothing)
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
print(json.dumps(seen))
"""


def test_every_prompt_of_an_epoch_is_answered_once() -> None:
    command = [str(aligner_python()), "-c", SCRIPT, str(ENTRY)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    for epoch in (seen[:24], seen[24:]):
        assert sorted(epoch) == list(range(24))
    assert seen[:24] != seen[24:]
