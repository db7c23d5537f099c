"""Every key of configs/align is read by NeMo-Aligner, NeMo, Megatron-Core, Lightning, or our scripts over them."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from nemo_minitron.backends.aligner.config import TRAINER_KEYS, Method, base_config, flat
from nemo_minitron.backends.aligner.environment import ENTRY, aligner_python

READERS = ("nemo_aligner", "nemo/core", "nemo/utils", "nemo/collections/nlp", "megatron/core", "lightning/pytorch")
LOGGED = {"trainer.logger", "name", "exp_manager.name"}


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


@pytest.mark.parametrize("method", TRAINER_KEYS)
def test_every_key_is_read_somewhere(method: Method) -> None:
    unread = {key for key in flat(base_config(method)) if key not in LOGGED and key.split(".")[-1] not in _words()}
    assert not unread
