"""The check of one GPU: an item that exceeds its bound is not ok, and each peak of memory is that of its own steps."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import REPO
from tests.support.tiny_models import load_transformers


@pytest.fixture
def items(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    return importlib.import_module("gpu_items")


@pytest.mark.parametrize(("distance", "ok"), [(0.01, True), (0.011, False), (math.nan, False)])
def test_an_item_that_exceeds_its_bound_is_not_ok(distance: float, ok: bool, items: ModuleType, tmp_path: Path) -> None:
    check, out = importlib.import_module("gpu_check"), tmp_path / "checks.jsonl"

    def function(_: Any) -> dict[str, Any]:
        return {
            "first": 7.0,
            "one": items.within(0.01, {"a": 0.0, "b": distance}),
            "two": items.within(1.0, {"c": 1.0}),
        }

    item = check.Item("name", 1.0, function)
    line = check.run_item(item, items.Context(tmp_path, on_gpu=False), out, deadline_s=math.inf)
    assert line["ok"] is ok
    assert json.loads(out.read_text())["ok"] is ok


def test_an_item_without_bounds_is_ok(items: ModuleType, tmp_path: Path) -> None:
    check = importlib.import_module("gpu_check")
    item = check.Item("name", 1.0, lambda _: {"tokens_per_s": 1.0, "parts": {"a": {}}})
    context = items.Context(tmp_path, on_gpu=False)
    assert check.run_item(item, context, tmp_path / "checks.jsonl", deadline_s=math.inf)["ok"] is True


def test_the_peak_is_that_of_the_measured_steps(items: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    step = importlib.import_module("gpu_step")
    held, peak = 1 * 2**30, [20 * 2**30]

    def use(gib: int) -> float:
        peak[0] = max(peak[0], gib * 2**30)
        return 1.0

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(step, "forward_backward", lambda *_: use(3))
    monkeypatch.setattr(step, "matmul_flops_per_s", lambda *_: use(9))
    session = SimpleNamespace(on_gpu=True, device="cuda", world_size=1)
    model = SimpleNamespace(config=SimpleNamespace(params_dtype=torch.bfloat16))
    trainable = SimpleNamespace(model=model)
    job = SimpleNamespace(session=session, trainable=trainable, tokens_per_step=1, flops_per_token=1.0)
    assert step.measure(job, with_optimizer=False, rounds=1)["measured_peak_gib"] == 3.0


@pytest.mark.parametrize("place", [None, 0, 1])
def test_logits_that_are_nan_do_not_pass(
    place: int | None, items: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits_of(models: list[tuple[Path, None]], *_: object) -> list[np.ndarray]:
        tokens = torch.tensor(items.TOKENS)
        found = [load_transformers(path)(tokens).logits.detach().numpy() for path, _ in models]
        return [np.full_like(one, np.nan) if number == place else one for number, one in enumerate(found)]

    monkeypatch.setattr(items, "FAMILY_CASES", ["llama_mha", "qwen2"])
    monkeypatch.setattr(items, "logits_of", logits_of)
    out = items.logits(items.Context(tmp_path, on_gpu=False))
    assert [values["passes"] for values in out.values()] == [place is None] * 2
