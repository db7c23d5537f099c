"""Weights & Biases gets the numbers of the curves, offline here; a resumed training continues the same run."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.backends.megatron.training.curves import Curves, Tracker
from nemo_minitron.errors import EnvironmentProblem
from tests.conftest import TOY, Cli


def _tracker(folder: Path) -> Tracker:
    return Tracker("a-project", "toy/width", "distill", folder / "logs")


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r'pip install "nemo-minitron\[tracking\]"'):
        Curves(tmp_path, first_step=-1, enabled=True, tracker=_tracker(tmp_path))


def test_other_ranks_do_not_even_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    curves = Curves(tmp_path, first_step=-1, enabled=False, tracker=_tracker(tmp_path))
    curves.add(1, train_loss=1.0)
    curves.close()
    assert not list(tmp_path.iterdir())


def _records(file: Path) -> Iterator[bytes]:
    """Yield the records of a .wandb file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def _logged(logs: Path) -> list[tuple[str, Any, list[dict[str, float]]]]:
    """Return (run id, name, rows) of every offline run, oldest first."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(logs.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        named, rows = None, []
        for data in _records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                run = record.run
                named = run.run_id, (run.project, run.display_name, run.job_type)
            elif record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.append({key: value for key, value in items.items() if not key.startswith("_")})
        assert named is not None
        found.append((*named, rows))
    return found


def test_the_rows_of_the_curves_are_logged_and_a_resumed_run_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = Curves(tmp_path, first_step=-1, enabled=True, tracker=_tracker(tmp_path))
    for step in (1, 2, 3):
        first.add(step, train_loss=3.0 - 0.5 * step)
    first.add(3, valid_kl=0.25)
    first.close()
    # The checkpoint is of step 2, so step 3 is repeated.
    again = Curves(tmp_path, first_step=2, enabled=True, tracker=_tracker(tmp_path))
    again.add(3, train_loss=1.25)
    again.close()
    (one, named, rows), (other, _, more) = _logged(tmp_path / "logs")
    assert named == ("a-project", "toy/width", "distill")
    assert one == other
    assert [row for row in rows if "train_loss" in row] == [
        {"step": step, "train_loss": 3.0 - 0.5 * step} for step in (1, 2, 3)
    ]
    assert {"step": 3, "valid_kl": 0.25} in rows
    assert more == [{"step": 3, "train_loss": 1.25}]


def test_a_recipe_logs_its_distillation(tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    overrides = ["stages.distill.num_steps=6", "execution.wandb_project=a-project", "--until", "distill"]
    code, output = minitron("run", TOY, f"execution.run_root={tmp_path}", *overrides)
    assert code == 0, output
    run = tmp_path / "toy/width"
    rows = [json.loads(line) for line in (run / "distill/curves.jsonl").open()]
    ((_, named, logged),) = _logged(run / "logs")
    assert named == ("a-project", "toy/width", "distill")
    assert logged == rows
    assert rows[-1]["step"] == 6
