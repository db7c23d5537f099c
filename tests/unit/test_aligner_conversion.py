"""The conversion before a training by NeMo-Aligner, which pads the vocabulary for the tp of the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.backends.alignment.base import TaskContext
from nemo_minitron.backends.alignment.nemo_aligner import convert
from nemo_minitron.backends.alignment.nemo_aligner.last_checkpoint import EXPERIMENT_DIR
from nemo_minitron.backends.alignment.nemo_aligner.training import converted
from nemo_minitron.errors import ConfigError
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress

VOCAB_SIZE = 513


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of the tp of each conversion; none is made."""
    found: list[int] = []

    def to_nemo(model_dir: Path, out: Path, *_: Any, tp: int, **__: Any) -> dict[str, Any]:
        found.append(tp)
        out.mkdir(exist_ok=True)
        return {"override_vocab_size": -(-VOCAB_SIZE // tp) * tp}

    monkeypatch.setattr(convert, "to_nemo", to_nemo)
    return found


def _convert(root: Path, tp: int) -> int:
    context = TaskContext("sft", root, Parallel(tp=tp), "cpu", 1, Progress(silent=True), StopRequest())
    size: int = converted(root, 64, root / "nemo", context, None, on_cpu=True)["override_vocab_size"]
    return size


def test_a_start_with_another_tp_converts_again_if_its_ranks_cannot_share_the_vocabulary(
    conversions: list[int], tmp_path: Path
) -> None:
    assert [_convert(tmp_path, tp) for tp in (1, 1, 3, 2, 1)] == [513, 513, 513, 514, 514]
    assert conversions == [1, 2]


def test_a_checkpoint_with_a_vocabulary_that_tp_does_not_divide_is_not_resumed(
    conversions: list[int], tmp_path: Path
) -> None:
    _convert(tmp_path, 1)
    (tmp_path / "training" / EXPERIMENT_DIR / "checkpoints" / "step=7-consumed_samples=14-last").mkdir(parents=True)
    with pytest.raises(ConfigError, match="checkpoint of step 7 with tp = 2: the vocabulary there is padded to 513"):
        _convert(tmp_path, 2)
    assert (conversions, _convert(tmp_path, 3)) == ([1], 513)
