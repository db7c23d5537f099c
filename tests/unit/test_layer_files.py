"""Finished layers of a stage in its work folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_minitron.backends.megatron.compensation.repair import repaired_layers
from nemo_minitron.stages.common.layer_files import LayerFiles


@pytest.mark.parametrize("num_bytes", [0, 5, 60, -1])
def test_a_truncated_layer_is_not_finished(num_bytes: int, tmp_path: Path) -> None:
    """A machine that crashes may leave a file with its final name but without all of its data."""
    files = LayerFiles(tmp_path)
    for layer in range(3):
        files.save(layer, {f"weight.{layer}": torch.ones(4, 4)}, f"facts {layer}")
    file = tmp_path / "layer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    assert [layer in files for layer in range(4)] == [True, False, True, False]
    assert list(files) == [0, 2]
    assert files.names() == {"weight.0": 0, "weight.2": 2}
    files.save(1, {"weight.1": torch.ones(4, 4)}, "facts 1")
    assert list(files) == [0, 1, 2]
    assert files.facts(1) == "facts 1"


def test_the_first_rank_decides_which_layers_are_repaired_again() -> None:
    """Each repair sums over all ranks, so that a rank that sees other files would wait forever."""
    repaired: list[int] = []
    repair: Any = SimpleNamespace(
        session=SimpleNamespace(gather=lambda own: [[0, 2], own]),
        models=SimpleNamespace(target=SimpleNamespace(num_layers=3)),
        repairs_head=False,
        skip_dropped_before_first=lambda _: None,
        repair=lambda number, _: (repaired.append(number), ({}, {}))[1],
        advance=lambda *_: None,
    )
    seen_here: Mapping[int, Any] = {0: {}, 1: {}, 2: {}}
    assert [number for number, *_ in repaired_layers(repair, [], seen_here)] == [0, 1, 2]
    assert repaired == [1]
