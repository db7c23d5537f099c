"""Differences between versions of Megatron-Core, with the installed one and with stand-ins for others."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_minitron.backends.megatron.model import build
from nemo_minitron.backends.megatron.runtime import versions
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.families import ModelShape
from nemo_minitron.families.shape import Llama3RopeScaling
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.schema.execution import Parallel
from tests.support.tiny_models import tiny_model_dir


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return Checkpoint.open(tiny_model_dir(tmp_path_factory.mktemp("model") / "m", "llama31_rope")).shape


def test_no_field_of_a_config_is_dropped_without_a_word() -> None:
    with pytest.raises(AssertionError, match=r"TransformerConfig of Megatron-Core .* has no .*number_of_layers"):
        versions.known_fields(TransformerConfig, {"num_layers": 2, "number_of_layers": 2})


def test_the_layers_of_uneven_stages_reach_megatron_under_its_own_names() -> None:
    wanted = {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 2}
    found = versions.known_fields(TransformerConfig, wanted)
    assert sorted(found.values()) == [2, 3]
    sizes = {"num_layers": 5, "hidden_size": 8, "num_attention_heads": 1}
    TransformerConfig(**sizes, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, **found)


def test_fields_of_older_versions_are_found_by_their_older_names() -> None:
    @dataclass
    class Older:
        first_pipeline_num_layers: int = 0

    options = {"num_layers_in_first_pipeline_stage": 3, "recompute_modules": ["core_attn"]}
    assert versions.known_fields(Older, options) == {"first_pipeline_num_layers": 3}
    assert "lr" in versions.known_fields(OptimizerConfig, {"lr": 1e-3, "overlap_param_gather": True})


@pytest.mark.parametrize(("version", "factor"), [((0, 10), 4), ((0, 11), 4), ((0, 12), 1), ((0, 16), 1), ((0, 19), 1)])
def test_a_share_of_a_loss_is_scaled_where_megatron_does_not(
    version: tuple[int, int], factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_VERSION", version)
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 4)
    assert versions.share_of_loss(torch.tensor(0.5)) == 0.5 * factor


def test_megatron_does_not_warn_of_how_its_layers_are_described(
    shape: ModelShape, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), open_session(Parallel(), device="cpu", threads=1) as session:
        build.build_model(shape, session, precision="fp32", seq_len_tokens=8)
    assert "Rewrapping" not in caplog.text
    assert "Unknown MLP" not in caplog.text


def _older_model(
    config: Any, transformer_layer_spec: Any, vocab_size: int, max_sequence_length: int, rope_scaling: bool = False
) -> None: ...


class OlderModel:
    """This class has the arguments of GPTModel in 0.10."""

    __init__ = _older_model


@pytest.mark.parametrize("model", [GPTModel, OlderModel], ids=["installed", "0.10"])
def test_a_rope_scaling_that_megatron_does_not_know_is_refused(
    model: type, shape: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "GPTModel", model)
    other = replace(shape, rope_scaling=Llama3RopeScaling(factor=32.0))
    if "rope_scaling_factor" in inspect.signature(model.__init__).parameters:
        assert versions.rope_scaling_options(other) == {"rope_scaling": True, "rope_scaling_factor": 32.0}
        return
    assert versions.rope_scaling_options(shape) == {"rope_scaling": True}
    with pytest.raises(EnvironmentProblem, match="does not support the rope scaling factor 32") as found:
        versions.rope_scaling_options(other)
    assert found.value.next_step == "Use megatron-core 0.11 or later for this model."


def test_megatron_does_not_announce_the_end_of_its_model_class(
    shape: ModelShape, caplog: pytest.LogCaptureFixture
) -> None:
    """Megatron logs this warning since 0.19."""
    with caplog.at_level(logging.WARNING), open_session(Parallel(), device="cpu") as session:
        build.build_model(shape, session, precision="fp32", seq_len_tokens=8)
    assert "DEPRECATED" not in caplog.text


def test_a_model_class_that_this_version_lacks_is_refused(shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.MODEL_CLASS_VARIABLE, "hybrid")
    monkeypatch.setattr(build, "find_spec", lambda _: None)
    with (
        open_session(Parallel(), device="cpu") as session,
        pytest.raises(EnvironmentProblem, match="MINITRON_MODEL_CLASS = hybrid, but this Megatron-Core has no Hybrid"),
    ):
        build.build_model(shape, session, precision="fp32", seq_len_tokens=8)
