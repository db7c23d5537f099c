"""Items of benchmarks/gpu_check.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_items
from tests.support.tiny_models import load_transformers


@pytest.mark.parametrize("place", [None, 0, 1])
def test_logits_that_are_nan_do_not_pass(place: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def logits_of(models: list[tuple[Path, None]], *_: object) -> list[np.ndarray]:
        tokens = gpu_items.torch.tensor(gpu_items.TOKENS)
        found = [load_transformers(path)(tokens).logits.detach().numpy() for path, _ in models]
        return [np.full_like(one, np.nan) if number == place else one for number, one in enumerate(found)]

    monkeypatch.setattr(gpu_items, "FAMILY_CASES", ["llama_mha", "qwen2"])
    monkeypatch.setattr(gpu_items, "logits_of", logits_of)
    out = gpu_items.logits(gpu_items.Context(tmp_path, on_gpu=False))
    assert {name: values["passes"] for name, values in out.items()} == dict.fromkeys(
        ("torch fp32", "torch bf16"), place is None
    )
