"""The check of a teacher in FP8, with a stand-in for FP8 that rounds what each layer returns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer import transformer_block

from nemo_minitron.api import load_plan
from nemo_minitron.backends.megatron.distillation import distill, fp8_teacher
from nemo_minitron.backends.megatron.distillation.fp8_teacher import MEASUREMENT_FILE, set_fp8
from nemo_minitron.backends.megatron.model.forward import model_logits
from nemo_minitron.backends.megatron.model.parts import Model
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.session import Session, open_session
from nemo_minitron.errors import EnvironmentProblem, NumericsError, PlanError
from nemo_minitron.plan.fingerprint import params_of
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import Fp8Teacher
from tests.conftest import TOY
from tests.support.tiny_distill import TWENTY_STEPS, distill_folders

needs_recipes = pytest.mark.skipif(
    not hasattr(transformer_block, "get_fp8_context"), reason="this Megatron-Core has delayed scaling only, inline"
)
PARAMS = TWENTY_STEPS.model_copy(update={"precision": "bf16", "teacher_fp8": Fp8Teacher(max_kl=0.02)})


@pytest.fixture
def session() -> Iterator[Session]:
    with open_session(Parallel(), device="cpu", threads=1) as opened:
        yield opened


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return distill_folders(tmp_path)


def _rounded(model: Model, step: float) -> None:
    """Round the output of each layer to multiples of a step of its largest value, where the config says FP8."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        hidden, *others = output
        if model.config.fp8 is None:
            return output
        scale = hidden.abs().amax() * step
        return ((hidden / scale).round() * scale, *others)

    for layer in model.decoder.layers:
        layer.register_forward_hook(hook)


def _prepare(folders: dict[str, Path], session: Session, step: float, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(teacher: Model, params: Fp8Teacher, _: Session) -> None:
        set_fp8(teacher, params)
        assert (teacher.config.fp8, teacher.config.fp8_recipe) == ("e4m3", "tensorwise")
        _rounded(teacher, step)

    # Megatron's own FP8 context needs Transformer Engine.
    monkeypatch.setattr("megatron.core.transformer.transformer_block.get_fp8_context", _no_context, raising=True)
    monkeypatch.setattr(distill, "run_in_fp8", run)
    return distill.prepare(
        PARAMS, folders["student"], folders["teacher"], folders["data"], folders["work"] / "run", session
    )


def _no_context(*_: Any, **__: Any) -> Any:
    from contextlib import nullcontext

    return nullcontext()


@needs_recipes
def test_a_close_teacher_is_used_and_its_kl_is_that_of_its_logits(
    folders: dict[str, Path], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = 1 / 64
    job = _prepare(folders, session, step, monkeypatch)
    facts = json.loads((folders["work"] / "run" / MEASUREMENT_FILE).read_text())
    assert 0 < facts["kl_nats_per_token"] <= facts["max_kl"] == 0.02
    teacher, _ = load_model(folders["teacher"], session, precision="bf16", seq_len_tokens=32)
    _rounded(teacher, step)
    batches = distill.heldout_text(PARAMS, folders["data"], session).batches
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches[: fp8_teacher.MAX_BATCHES]:
            exact = model_logits(teacher, batch).double().log_softmax(-1)
            teacher.config.fp8 = "e4m3"
            monkeypatch.setattr("megatron.core.transformer.transformer_block.get_fp8_context", _no_context)
            found = model_logits(teacher, batch).double().log_softmax(-1)
            teacher.config.fp8 = None
            kl = (exact.exp() * (exact - found)).sum(-1)
            total, count = total + float((kl * batch["loss_mask"]).sum()), count + int(batch["loss_mask"].sum())
    assert facts["num_tokens"] == count
    # Logits in bf16 here, in fp32 from bf16 there.
    assert facts["kl_nats_per_token"] == pytest.approx(total / count, rel=0.15)
    assert job.trainable.model.config.fp8 is None, "the student stays in bf16"


@needs_recipes
def test_a_teacher_that_is_too_far_away_stops_the_training(
    folders: dict[str, Path], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NumericsError, match="not close to the bf16 teacher") as error:
        _prepare(folders, session, 1 / 4, monkeypatch)
    assert error.value.allowed == "at most teacher_fp8.max_kl = 0.02"


def test_without_transformer_engine_it_is_refused(folders: dict[str, Path], session: Session) -> None:
    with pytest.raises(EnvironmentProblem, match="needs Transformer Engine on a GPU"):
        distill.prepare(
            PARAMS, folders["student"], folders["teacher"], folders["data"], folders["work"] / "run", session
        )


def test_an_older_megatron_refuses_what_it_does_not_know() -> None:
    @dataclass
    class Config:
        fp8: str | None = None

    model: Any = SimpleNamespace(config=Config())
    with pytest.raises(EnvironmentProblem, match="has delayed scaling only"):
        set_fp8(model, Fp8Teacher())
    assert model.config.fp8 is None


def test_the_default_does_not_change_fingerprints() -> None:
    assert "teacher_fp8" not in params_of(TWENTY_STEPS)
    assert params_of(PARAMS)["teacher_fp8"]["scaling"] == "tensorwise"


def test_check_refuses_a_teacher_that_is_not_live_fixed_and_in_bf16(tmp_path: Path) -> None:
    overrides = ["+stages.distill.teacher_fp8={}", "stages.distill.precision=fp32", f"execution.run_root={tmp_path}"]
    with pytest.raises(PlanError, match="teacher_fp8: the rest of the model must be in bf16"):
        load_plan(TOY, overrides)
