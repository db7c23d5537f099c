"""transformers measures the model that Megatron trains: for every family and every spelling of its config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.backends.megatron.model.probe import run_probe_in_session
from nemo_minitron.backends.megatron.runtime.session import Session, open_session
from nemo_minitron.errors import CheckpointError, NumericsError
from nemo_minitron.evaluation import agreement, generation
from nemo_minitron.evaluation.agreement import make_probe, memory_of, require_agreement, transformers_logits
from nemo_minitron.evaluation.generation import load_for_inference
from nemo_minitron.families import ModelShape, read_shape
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.schema.execution import Parallel
from tests.support.model_folders import save_spelled, spelled_models
from tests.support.tiny_models import tiny_model

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session(Parallel(), device="cpu", threads=1) as opened:
        yield opened


SPELLED = spelled_models()


@pytest.mark.parametrize("name", SPELLED)
def test_loader_and_megatron_compute_the_model_that_was_saved(name: str, session: Session, tmp_path: Path) -> None:
    folder, model = tmp_path, SPELLED[name].save(tmp_path)
    probe = make_probe(Checkpoint.open(folder).shape)
    saved = transformers_logits(model, probe)
    assert saved.abs().max() > 1.0, "the model must say something"
    loaded = transformers_logits(load_for_inference(folder, "fp32", "cpu"), probe)
    assert (loaded - saved).abs().max() <= TOLERANCE
    assert (run_probe_in_session(folder, probe, session).logits - saved).abs().max() <= TOLERANCE


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "rope base": ("llama_gqa_tied", {"rope_theta": 10000.0}, "rope_theta: 10000 in transformers, 100000 in Megatron"),
    "slightly other base": ("qwen2", {"rope_theta": 1.01e6}, "rope_theta: 1.01e+06 in transformers, 1e+06 in Megatron"),
    "rope scaling": ("llama31_rope", {"rope_scaling": None}, "rope scaling: transformers and Megatron"),
    "norm eps": ("qwen3", {"norm_eps": 1e-5}, "norm eps: 1e-05 in transformers, 1e-06 in Megatron"),
    "rotated part of a head": ("nemotron", {"rotary_fraction": 1.0}, "rotated channels: 8 in transformers, 4 in"),
    "sliding window": ("mistral", {"sliding_window_tokens": 8}, "sliding_window: 8 in transformers, None in Megatron"),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_reading_is_refused_and_named(
    name: str, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, changes, words = WRONG[name]
    folder = save_spelled(tmp_path / "model", tiny_model(case))
    right = generation.model_config
    monkeypatch.setattr(generation, "model_config", lambda shape: right(replace(shape, **changes)))
    with pytest.raises(NumericsError, match="do not compute the same logits") as caught:
        require_agreement(folder, tmp_path / "memory.json", session)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "memory.json").exists()


def test_a_difference_in_arithmetic_only_is_refused(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, right = save_spelled(tmp_path / "model", tiny_model("qwen2")), transformers_logits
    monkeypatch.setattr(agreement, "transformers_logits", lambda model, probe: right(model, probe) * 1.001)
    with pytest.raises(NumericsError, match=r"Both read the same values from config\.json"):
        require_agreement(folder, tmp_path / "memory.json", session)


def test_logits_that_are_not_finite_are_reported(session: Session, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        require_agreement(save_spelled(tmp_path / "model", model), tmp_path / "memory.json", session)


def test_a_comparison_is_remembered_until_a_file_changes(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, memory = save_spelled(tmp_path / "model", tiny_model("qwen2")), tmp_path / ".compared" / "logits.json"
    compared: list[Path] = []
    right = agreement._compare
    monkeypatch.setattr(agreement, "_compare", lambda *args: (compared.append(args[0].path), right(*args))[1])
    for _ in range(2):
        require_agreement(folder, memory, session)
    assert len(compared) == 1
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0, "rope_parameters": None}))
    require_agreement(folder, memory, session)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    require_agreement(folder, memory, session)
    assert len(compared) == 3
    memory.write_text(memory.read_text()[:-20])
    require_agreement(folder, memory, session)
    assert len(compared) == 4


def test_the_memory_is_that_of_the_run_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "run" / "distill").mkdir(parents=True)
    assert memory_of(tmp_path / "run" / "distill").is_relative_to(tmp_path / "cache")
    (tmp_path / "run" / "distill" / "manifest.json").write_text("{}")
    assert memory_of(tmp_path / "run" / "distill") == tmp_path / "run" / ".compared" / "logits.json"


def test_without_a_home_a_model_is_compared_each_time(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(agreement, "cache_dir", no_home)
    folder = save_spelled(tmp_path, tiny_model("qwen2"))
    assert memory_of(folder) is None
    require_agreement(folder, None, session)


def _published(**sizes: int) -> ModelShape:
    named = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 128256,
    }
    return read_shape({"architectures": ["LlamaForCausalLM"], **named, **sizes})


def test_large_models_are_compared_by_two_layers_and_small_ones_whole() -> None:
    assert make_probe(_published()).num_layers == 2
    assert make_probe(_published(num_hidden_layers=1)).num_layers == 1
    small = _published(hidden_size=64, intermediate_size=96, num_attention_heads=8, vocab_size=512)
    assert make_probe(small).num_layers == 32
    probe = make_probe(_published())
    assert {0, 128255} <= set(probe.tokens)
    assert max(probe.tokens) == 128255
    assert max(probe.positions) - min(probe.positions) >= 2000


def test_the_accepted_difference_scales_with_very_small_or_large_logits() -> None:
    noise = torch.randn(10000, generator=torch.Generator().manual_seed(0))
    noise /= noise.std()
    for spread, accepted in ((0.01, 1e-5), (1.0, 1e-3), (5.0, 1e-3), (10.0, 1e-3), (300.0, 3e-2)):
        assert agreement.accepted_difference(noise * spread) == pytest.approx(accepted, rel=1e-3)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    folder = save_spelled(tmp_path, tiny_model("qwen2"))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "another/model"}))
    with pytest.raises(CheckpointError, match="adapter"):
        load_for_inference(folder, "fp32", "cpu")
