"""Every key of configs/align is read by NeMo-Aligner, NeMo, Megatron-Core, Lightning, or our scripts over them."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from nemo_minitron.backends.alignment.nemo_aligner.config import Method, base_config, flat
from nemo_minitron.backends.alignment.nemo_aligner.environment import ENTRY, aligner_python

READERS = (
    "nemo_aligner",
    "nemo/core",
    "nemo/utils",
    "nemo/export",
    "nemo/collections/nlp",
    "megatron/core",
    "lightning/pytorch",
)
LOGGED = {"trainer.logger", "name", "exp_manager.name"}
OF_SCRIPTS = {"rm_model_file", "output_path", "num_val_samples", "val_rollout_micro_batch_size"}
"""Read by scripts of NeMo-Aligner's repository alone, which the wheel does not have."""
SECTIONS = {"sft", "dpo", "rm", "knowledge_distillation", "ppo", "reinforce"}
"""Of `trainer`; all else there is for Lightning."""


@cache
def _words() -> frozenset[str]:
    """Every identifier and string that the packages' code has."""
    command = [str(aligner_python()), "-c", "import nemo, pathlib; print(pathlib.Path(nemo.__file__).parents[1])"]
    site = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1])
    words: set[str] = set()
    for folder in (ENTRY, *(site / reader for reader in READERS)):
        for file in folder.rglob("*.py"):
            words.update(re.findall(r"\w+", file.read_text(errors="ignore")))
    return frozenset(words)


@cache
def _arguments() -> dict[str, set[str]]:
    """What Lightning's trainer and NeMo's experiment manager take; neither takes anything else."""
    code = """
import dataclasses, inspect, json
from lightning.pytorch import Trainer
from nemo.utils.exp_manager import CallbackParams, ExpManagerConfig
names = {"trainer": list(inspect.signature(Trainer.__init__).parameters)}
names["exp_manager"] = [field.name for field in dataclasses.fields(ExpManagerConfig)]
names["checkpoint_callback_params"] = [field.name for field in dataclasses.fields(CallbackParams)]
print(json.dumps(names))
"""
    command = [str(aligner_python()), "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    return {name: set(found) for name, found in json.loads(told).items()}


@pytest.mark.parametrize("method", get_args(Method))
def test_every_key_is_read_somewhere(method: Method) -> None:
    keys = flat(base_config(method)).keys() - LOGGED
    assert not {key for key in keys if key.split(".")[-1] not in _words() | OF_SCRIPTS}


@pytest.mark.parametrize("method", get_args(Method))
def test_keys_for_lightning_and_the_experiment_manager_are_arguments_of_theirs(method: Method) -> None:
    config, known = base_config(method), _arguments()
    assert not config["trainer"].keys() - SECTIONS - known["trainer"]
    manager = config.get("exp_manager", {})
    assert not manager.keys() - known["exp_manager"]
    assert not manager.get("checkpoint_callback_params", {}).keys() - known["checkpoint_callback_params"]
