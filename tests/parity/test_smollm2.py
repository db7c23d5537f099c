"""SmolLM2-135M: logits, bits and perplexity equal those of transformers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.import_model.params import ImportStage
from nemo_minitron.system.progress import Progress
from tests.conftest import REPO
from tests.support.distributed import run_ranks
from tests.support.megatron_ranks import logits_of
from tests.support.tiny_models import load_transformers

pytestmark = [pytest.mark.slow, pytest.mark.assets]
ASSETS = REPO / "assets"
# 9 heads in 3 groups: tensor parallelism can be 1 or 3, never 2; `minitron check` says so.
LAYOUTS = {"tp1": Parallel(), "tp3": Parallel(tp=3), "pp2": Parallel(pp=2)}
TOKENS = torch.randint(0, 49152, (1, 48), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nemo_minitron.schema.execution import Execution
    from nemo_minitron.stages.context import StageContext
    from nemo_minitron.stages.import_model.run import import_model
    from nemo_minitron.stages.typed_inputs import NoInputs

    if not (ASSETS / "smollm2-135m-instruct").exists():
        pytest.skip("needs `minitron assets fetch`")
    out = tmp_path_factory.mktemp("smollm2")
    context = StageContext("teacher", "test", out, out, Execution(assets_dir=str(ASSETS)), Progress(silent=True))
    result = import_model(ImportStage(kind="import", source="asset:smollm2-135m-instruct"), NoInputs(), context)
    assert result["num_params"] == 134_515_008
    return out


@pytest.fixture(scope="module", params=LAYOUTS)
def megatron(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[NDArray, Path]:
    out = tmp_path_factory.mktemp("again")
    parallel = LAYOUTS[request.param]
    ranks = run_ranks(parallel.world_size, logits_of, [(smollm2, out)], parallel, TOKENS)
    return next(values[0] for values in reversed(ranks) if values[0] is not None), out


def test_logits_equal_transformers(smollm2: Path, megatron: tuple[NDArray, Path]) -> None:
    with torch.no_grad():
        expected = load_transformers(smollm2)(torch.tensor(TOKENS)).logits.numpy()
    difference = np.abs(megatron[0] - expected).max()
    print(f"max |logits difference| {difference:.2e}")
    assert difference <= 1e-4


def test_the_round_trip_is_bit_identical(smollm2: Path, megatron: tuple[NDArray, Path]) -> None:
    before, after = load_file(smollm2 / "model.safetensors"), load_file(megatron[1] / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_perplexity_of_text_equals_transformers_within_a_thousandth(smollm2: Path, tmp_path: Path) -> None:
    ours, windows = run_ranks(1, _our_perplexity, smollm2, tmp_path)[0]
    model = load_transformers(smollm2)
    nll, count = 0.0, 0
    with torch.no_grad():
        for tokens, mask in windows:
            logits = model(torch.tensor(tokens[None, :-1])).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
            nll += float((losses * torch.tensor(mask)).sum())
            count += int(mask.sum())
    expected = math.exp(nll / count)
    print(f"perplexity {ours:.4f}, transformers {expected:.4f}")
    assert ours == pytest.approx(expected, rel=1e-3)


def _our_perplexity(model_dir: Path, folder: Path) -> tuple[float, list[tuple[NDArray, NDArray]]]:
    """Return (perplexity through Megatron, its windows), on text of the package."""
    from nemo_minitron.backends.megatron.data.datasets import heldout_batches
    from nemo_minitron.backends.megatron.model.evaluate import heldout_loss
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.schema.execution import Execution
    from nemo_minitron.stages.artifacts import Model
    from nemo_minitron.stages.context import StageContext
    from nemo_minitron.stages.tokenize.params import TokenizeStage
    from nemo_minitron.stages.tokenize.run import Inputs, tokenize

    silent = Progress(silent=True)
    stage = TokenizeStage(kind="tokenize", sources=({"source": "asset:toy-text"},), valid_fraction=0.3)
    context = StageContext("data", "t", folder, folder, Execution(), silent)
    tokenize(stage, Inputs(Model("teacher", "import", model_dir, "", {})), context)
    sizes = {"num_tokens": 4000, "seq_len_tokens": 512}
    with open_session(Parallel(), device="cpu", threads=1) as session:
        found = heldout_loss(model_dir, folder, **sizes, precision="fp32", session=session, progress=silent)
        batches = heldout_batches(folder, session, **sizes, batch_size=1).batches
    windows = [
        (torch.cat([batch["tokens"][0], batch["labels"][0][-1:]]).numpy(), batch["loss_mask"][0].numpy())
        for batch in batches
    ]
    return math.exp(found.loss), windows
