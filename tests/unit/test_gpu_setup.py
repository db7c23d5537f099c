"""Setup of a session on a GPU: the environment, the precision of fp32 products, and the kind of layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_minitron.backends.megatron.model import layers
from nemo_minitron.backends.megatron.runtime.session import _full_fp32_products
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.execution.task import StageTask
from nemo_minitron.processes import gpu_environment as module
from nemo_minitron.processes.gpu_environment import gpu_environment
from nemo_minitron.schema.execution import Execution, Parallel

ALLOCATOR = "PYTORCH_ALLOC_CONF"


@pytest.fixture
def torch_version(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(module, "_torch_version", lambda: (2, 9))
    return monkeypatch


@pytest.mark.parametrize(
    ("splits_layers", "num_processes", "names"),
    [
        (False, 1, {ALLOCATOR}),
        (False, 8, {ALLOCATOR, "NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN"}),
        (
            True,
            8,
            {
                ALLOCATOR,
                "CUDA_DEVICE_MAX_CONNECTIONS",
                "NVTE_FWD_LAYERNORM_SM_MARGIN",
                "NVTE_BWD_LAYERNORM_SM_MARGIN",
            },
        ),
    ],
)
def test_the_environment_depends_on_the_layout(
    splits_layers: bool, num_processes: int, names: set[str], torch_version: pytest.MonkeyPatch
) -> None:
    assert set(gpu_environment({}, splits_layers=splits_layers, num_processes=num_processes)) == names


def test_the_environment_of_the_user_comes_first(torch_version: pytest.MonkeyPatch) -> None:
    found = gpu_environment(
        {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "PYTORCH_CUDA_ALLOC_CONF": "x"}, splits_layers=True, num_processes=1
    )
    assert found == {}


def test_old_versions_of_torch_have_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_torch_version", lambda: (2, 7))
    found = gpu_environment({}, splits_layers=False, num_processes=2)
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert found["TORCH_NCCL_AVOID_RECORD_STREAMS"] == "1"
    assert ALLOCATOR not in found


@pytest.mark.parametrize(
    ("device", "has_driver", "is_set"), [("cpu", True, False), ("auto", False, False), ("auto", True, True)]
)
def test_only_stages_on_gpus_get_it(
    device: str, has_driver: bool, is_set: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nemo_minitron.execution.task.has_nvidia_driver", lambda: has_driver)
    execution = Execution(device=device)  # type: ignore[arg-type]
    task = StageTask("x", "r", None, {}, Parallel(tp=2), execution, tmp_path, tmp_path, tmp_path)  # type: ignore[arg-type]
    assert ("CUDA_DEVICE_MAX_CONNECTIONS" in task.gpu_environment()) == is_set


def test_fp32_products_are_not_tf32_even_if_an_image_enables_it() -> None:
    """NVIDIA's images set this variable; torch reads it when it is imported."""
    code = (
        "import torch\n"
        "from nemo_minitron.backends.megatron.runtime.session import _full_fp32_products\n"
        "before = torch.get_float32_matmul_precision()\n"
        "with _full_fp32_products(): print(before, torch.get_float32_matmul_precision())\n"
    )
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["high", "highest"]


def test_the_precision_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with _full_fp32_products():
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def broken_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").touch()
    (tmp_path / "transformer_engine/pytorch.py").write_text("raise ImportError('undefined symbol: cudnn')")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("broken_engine")
def test_an_engine_that_cannot_be_imported_is_an_error_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not layers.has_transformer_engine(), "on a CPU it is not used"
    assert layers.layers_in_use() == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(EnvironmentProblem, match="cannot be imported: undefined symbol: cudnn"):
        layers.has_transformer_engine()


def test_without_an_engine_a_gpu_runs_torch_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(layers, "find_spec", lambda name: None)
    assert layers.layers_in_use() == "torch"
