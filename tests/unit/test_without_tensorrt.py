"""The stand-in for TensorRT-LLM that NeMo-Aligner's actors import: it can be imported, but not used."""

from __future__ import annotations

import importlib.util
import runpy
import sys

import pytest

from nemo_minitron.backends.alignment.nemo_aligner.environment import ENTRY


def test_it_can_be_imported_in_its_context_and_refuses_to_be_used() -> None:
    if importlib.util.find_spec("tensorrt_llm") is not None:
        pytest.skip("TensorRT-LLM is installed")
    importable = runpy.run_path(str(ENTRY / "without_tensorrt.py"))["importable"]
    with importable():
        import tensorrt_llm
        from tensorrt_llm.models.modeling_utils import PretrainedConfig

        class Config(PretrainedConfig):  # type: ignore[misc]
            pass

        with pytest.raises(RuntimeError, match="TensorRT-LLM is not installed"):
            tensorrt_llm.runtime.SamplingConfig(end_id=0)
        with pytest.raises(RuntimeError, match="TensorRT-LLM is not installed"):
            Config()
        with pytest.raises(RuntimeError, match="TensorRT-LLM is not installed"):
            PretrainedConfig.from_dict({})
    assert not [name for name in sys.modules if name.startswith("tensorrt")]
    assert importlib.util.find_spec("tensorrt_llm") is None
    with pytest.raises(ModuleNotFoundError):
        import tensorrt_llm.runtime
