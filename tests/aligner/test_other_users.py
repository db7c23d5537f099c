"""Another user of the machine, while NeMo-Aligner trains."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.aligner import Border, Layout, losses, train, training_config, write_rows
from tests.support.processes import MARK
from tests.support.stranger import stranger
from tests.support.tiny_models import tiny_model_dir

pytestmark = pytest.mark.slow


def test_an_alignment_offers_no_other_user_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    border = Border(tiny_model_dir(tmp_path, "llama_gqa_tied", head_dim=16), tmp_path / "work").cross()
    write_rows("sft", tmp_path / "rows.jsonl", num_rows=4)
    everybody, found = tmp_path / "everybody", {}
    everybody.mkdir()
    everybody.chmod(0o1777)
    for name, layout in {"one": Layout(), "two": Layout(tp=2)}.items():
        mark, work = uuid4().hex, tmp_path / name
        monkeypatch.setenv(MARK, mark)
        config = training_config("sft", border.nemo, tmp_path / "rows.jsonl", work, num_steps=3, layout=layout)
        with stranger(mark, everybody / "marker") as seen:
            found[name] = losses(train("sft", config, border.nemo, work, layout), "train/loss")
        assert seen.addresses, "gloo's sockets must be found for this to mean anything"
        assert (seen.beyond_loopback, seen.stores) == (set(), [])
        assert len(seen.attacked) == len(seen.addresses)
    assert found["two"] == pytest.approx(found["one"], rel=1e-4)
    assert not list(everybody.iterdir()), "a command of the stranger has run"
