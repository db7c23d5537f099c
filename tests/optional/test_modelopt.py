"""The indices that we keep are those that NVIDIA's own pruner, ModelOpt's `mcore_minitron`, keeps.

Both sides load the same tiny teacher through our loader into Megatron-Core and see the same batches, in fp32. ModelOpt
runs whole: `mtp.prune` collects its scores, sorts, cuts and exports, and modelopt_side.py finds every column of the
pruned weights in the teacher's. Nothing of its algorithm is written again here.

What ModelOpt needs to accept our model on a CPU (modelopt_side.py does it):

- Our norm, TorchNorm, is registered as a dynamic module: ModelOpt registers only the norms of Transformer Engine and
  Apex (FusedLayerNorm), and refuses to convert a layer whose norm it does not know.
- Its model is built with Megatron's DotProductAttention in place of our SdpaCoreAttention: ModelOpt asserts one of
  Megatron's or Transformer Engine's. The arithmetic is the same, up to the rounding of fp32.
- The divisors of its configuration are 1: its defaults (256 and 512) allow no size of a tiny model.

ModelOpt 0.43.0 is the newest that imports without Transformer Engine. It lives in an environment of its own, made once
under the user's cache folder. That environment sees the packages of this one, so that torch and Megatron-Core are the
very same, and neither is downloaded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_minitron.pruning.plan_file import PrunePlan
from nemo_minitron.pruning.selection import choose_keep
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.score.params import ScoreStage
from nemo_minitron.stages.select.params import SelectStage
from tests.conftest import REPO
from tests.support.tiny_models import tiny_model_dir

pytestmark = pytest.mark.slow

MODELOPT = "nvidia-modelopt==0.43.0"
CASES = {
    "llama31_rope": "RMSNorm, SwiGLU, grouped queries",
    "qwen2": "the same with biases of queries, keys and values",
    "nemotron": "LayerNorm centred on zero, squared ReLU",
}
# Larger than the tiny models' own, so that another aggregation moves some index across the cut on every axis.
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192}
TARGET = {"hidden_size": 80, "ffn_hidden_size": 112, "num_attention_heads": 4}
SEQ_LEN_TOKENS = 48
BATCH_SIZES = (4, 2, 1)
"""Sizes of batches. They differ, so that a mean over batches instead of a sum over samples is detected."""
NO_NETWORK = (
    "(from versions: none)",
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "Read timed out",
)


@dataclass(frozen=True)
class Case:
    """A teacher, its calibration batches, and the indices that ModelOpt keeps."""

    model_dir: Path
    tokens: list[Tensor]
    modelopt: dict[str, Any]


@pytest.fixture(scope="module")
def modelopt_python() -> Path:
    """Return the interpreter of an environment with ModelOpt, which is made on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo-minitron"
    # An environment belongs to the one whose packages it sees.
    owner = hashlib.sha256(f"{sys.prefix} {sys.version}".encode()).hexdigest()[:8]
    folder = cache / f"{MODELOPT.replace('==', '-')}-{owner}"
    python, finished = folder / "bin" / "python", folder / "finished"
    if finished.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    (site_packages / "same_packages.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")) + "\n")
    install = [
        "install",
        "--quiet",
        "--retries",
        "1",
        "--constraint",
        str(REPO / "constraints" / "newest.txt"),
        MODELOPT,
    ]
    done = subprocess.run([python, "-m", "pip", *install], capture_output=True, text=True, check=False)
    if done.returncode and any(sign in done.stderr for sign in NO_NETWORK):
        pytest.skip(f"no network: pip cannot reach an index that has {MODELOPT}")
    assert done.returncode == 0, done.stderr
    finished.touch()
    return python


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, modelopt_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("modelopt")
    model_dir = tiny_model_dir(folder, request.param, **SIZES)
    tokens = _tokens()
    files = [folder / name for name in ("batches.safetensors", "target.json", "kept.json")]
    save_file({str(number): batch for number, batch in enumerate(tokens)}, files[0])
    files[1].write_text(json.dumps(TARGET))
    done = subprocess.run(
        [modelopt_python, REPO / "tests" / "optional" / "modelopt_side.py", model_dir, *files],
        # Where CUDA is there, our layers would be Transformer Engine's, which do not run on a CPU.
        env={**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Case(model_dir, tokens, json.loads(files[2].read_text()))


def _tokens() -> list[Tensor]:
    """Return batches with a few frequent tokens, as in text, so that means and l2 norms rank channels differently."""
    generator = torch.Generator().manual_seed(0)
    return [(512 * torch.rand((size, SEQ_LEN_TOKENS), generator=generator) ** 3).long() for size in BATCH_SIZES]


def _our_plan(case: Case, **score_params: str) -> PrunePlan:
    from nemo_minitron.backends.megatron.model.weights import load_model
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.scoring.stats import activation_scores

    params = ScoreStage.model_validate({"kind": "score", "precision": "fp32", **score_params})
    with open_session(Parallel(), device="cpu", threads=1) as session:
        model, shape = load_model(case.model_dir, session, precision="fp32", seq_len_tokens=SEQ_LEN_TOKENS)
        scores = activation_scores(model, shape, [{"tokens": batch} for batch in case.tokens], params, session)
    return choose_keep(scores, shape, SelectStage.model_validate({"kind": "select", "target": TARGET}))


def _per_layer(keep: Mapping[int, tuple[int, ...]]) -> list[list[int]]:
    return [list(keep[layer]) for layer in sorted(keep)]


def _sorted(layers: list[list[int]]) -> list[list[int]]:
    return [sorted(indices) for indices in layers]


def test_the_same_indices_stay(case: Case) -> None:
    plan = _our_plan(case)
    # Guards the comparison itself: every requested size was cut.
    assert len(plan.shared["hidden"]) == TARGET["hidden_size"]
    assert [len(indices) for indices in case.modelopt["ffn"]] == [TARGET["ffn_hidden_size"]] * 4
    assert list(plan.shared["hidden"]) == sorted(case.modelopt["hidden"])
    assert _per_layer(plan.by_layer["ffn"]) == _sorted(case.modelopt["ffn"])
    assert _per_layer(plan.by_layer["heads"]) == _sorted(case.modelopt["heads"])


@pytest.mark.parametrize(("sequence", "batch"), [("l2", "l2"), ("var", "l2"), ("mean", "mean")])
def test_another_aggregation_would_be_seen(case: Case, sequence: str, batch: str) -> None:
    plan = _our_plan(case, sequence_aggregation=sequence, batch_aggregation=batch)
    assert list(plan.shared["hidden"]) != sorted(case.modelopt["hidden"])
    layers = zip(_per_layer(plan.by_layer["ffn"]), _sorted(case.modelopt["ffn"]), strict=True)
    assert all(ours != theirs for ours, theirs in layers)
