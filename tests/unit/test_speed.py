"""Speeds are medians of interleaved rounds; the first round does not count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_minitron.evaluation import speed
from nemo_minitron.evaluation.speed import measure_speed, summarize, time_model
from tests.support.tiny_models import tiny_model


def test_models_take_turns_and_the_first_round_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fake(model: str, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        calls.append(model)
        return (1000.0, 1000.0) if len(calls) <= 2 else (10.0 * len(calls), 1.0)

    monkeypatch.setattr(speed, "time_model", fake)
    ticks: list[None] = []
    found = measure_speed(
        {"teacher": "t", "small": "s"}, prompt_tokens=4, new_tokens=2, rounds=3, tick=lambda: ticks.append(None)
    )
    assert calls == ["t", "s"] * 4
    assert len(ticks) == 4
    assert found["teacher"]["prefill_tokens_per_s"] == 50.0
    assert found["small"]["prefill_tokens_per_s"] == 60.0


def test_medians_extremes_and_ratios_by_hand() -> None:
    found = summarize({"teacher": [(10.0, 4.0), (30.0, 5.0), (20.0, 6.0)], "small": [(40.0, 10.0)]})
    assert found["teacher"] == {
        "prefill_tokens_per_s": 20.0,
        "prefill_tokens_per_s_min": 10.0,
        "prefill_tokens_per_s_max": 30.0,
        "prefill_ratio": 1.0,
        "generate_tokens_per_s": 5.0,
        "generate_tokens_per_s_min": 4.0,
        "generate_tokens_per_s_max": 6.0,
        "generate_ratio": 1.0,
    }
    assert found["small"]["prefill_ratio"] == 2.0
    assert found["small"]["generate_ratio"] == 2.0


@pytest.mark.parametrize("case", ["llama_mha", "nemotron", "qwen3"])
def test_a_real_model_reads_a_prompt_longer_than_its_vocabulary_and_writes(case: str) -> None:
    prefill, generate = time_model(tiny_model(case, vocab_size=64), prompt_tokens=80, new_tokens=3)
    assert prefill > 0
    assert generate > 0


def test_candidates_are_timed_on_the_device_of_the_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nemo_minitron.evaluation import agreement, speed
    from nemo_minitron.schema.speed import SpeedMeasurement
    from nemo_minitron.stages.search import candidate

    devices: list[str] = []
    monkeypatch.setattr(agreement, "load_compared", lambda folder, precision, device, **_: devices.append(device))
    monkeypatch.setattr(speed, "measure_speed", lambda models, **_: {"candidate": {"generate_tokens_per_s": 1.0}})
    context: Any = SimpleNamespace(open_session=SimpleNamespace(device=torch.device("cuda", 3)), logits_memory=None)
    candidate._speed(SpeedMeasurement(), tmp_path, context)
    assert devices == ["cuda:3"]


def test_the_other_ranks_wait_for_a_candidate_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Cutting and timing happen where the others wait in a group with a timeout of a day, not at NCCL's barrier."""
    from nemo_minitron.stages.search import candidate

    events: list[str] = []

    @contextmanager
    def main_works() -> Iterator[None]:
        events.append("waiting begins")
        yield
        events.append("waiting ends")

    monkeypatch.setattr(candidate, "_cut", lambda *_: events.append("cut"))
    monkeypatch.setattr(candidate, "_speed", lambda *_: events.append("time") or {"generate_tokens_per_s": 1.0})
    context: Any = SimpleNamespace(is_main=True, work_dir=tmp_path, open_session=SimpleNamespace(main_works=main_works))
    params: Any = SimpleNamespace(measure_speed=object())
    assert candidate._cut_and_measure(params, None, context, tmp_path / "pruned") == {"generate_tokens_per_s": 1.0}  # type: ignore[arg-type]
    assert events == ["waiting begins", "cut", "time", "waiting ends"]
