"""HybridModel, the successor of GPTModel, gives the same logits, scores, removals, losses and files."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from nemo_minitron.backends.megatron.model.build import MODEL_CLASS_VARIABLE
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.score.params import ScoreStage
from tests.support.distributed import run_ranks
from tests.support.megatron_ranks import distill_losses, distill_until, logits_of, scores_of
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_distill import TWENTY_STEPS, distill_folders
from tests.support.tiny_models import FAMILY_CASES, load_transformers, tiny_model_dir

pytestmark = pytest.mark.skipif(
    find_spec("megatron.core.models.hybrid") is None, reason="Megatron-Core has HybridModel since 0.19"
)
TOKENS = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(1)).tolist()
FAMILIES = tuple(FAMILY_CASES)


def _as_hybrid(function: Callable[..., Any], *args: Any) -> Any:
    os.environ[MODEL_CLASS_VARIABLE] = "hybrid"
    return function(*args)


def _run(parallel: Parallel, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run a function with HybridModel on every rank; it gets the layout after its first argument."""
    first, *rest = args
    return run_ranks(parallel.world_size, _as_hybrid, function, first, parallel, *rest)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hybrid")
    tiny_data_dir(root / "data")
    for case in FAMILIES:
        tiny_model_dir(root / "models", case)
    return root


@pytest.mark.parametrize("layout", [Parallel(), Parallel(tp=2), Parallel(pp=2)], ids=["one", "tp2", "pp2"])
def test_every_family_has_the_logits_of_transformers_and_round_trips_bit_for_bit(
    layout: Parallel, root: Path, tmp_path: Path
) -> None:
    models = [(root / "models" / case, tmp_path / case) for case in FAMILIES]
    for _, out in models:
        out.mkdir()
    last = next(values for values in reversed(_run(layout, logits_of, models, TOKENS)) if values[0] is not None)
    for (folder, out), logits in zip(models, last, strict=True):
        with torch.no_grad():
            expected = load_transformers(folder)(torch.tensor(TOKENS)).logits.numpy()
        assert np.abs(logits - expected).max() <= 1e-4, folder.name
        before, after = (load_file(where / "model.safetensors") for where in (folder, out))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), folder.name


def _stage(**keys: Any) -> tuple[str, ScoreStage]:
    return "fp64", ScoreStage.model_validate({"kind": "score", "num_samples": 8, "seq_len_tokens": 32, **keys})


SCORES = {
    "depth": _stage(
        layer_metrics=("block_influence", "lm_loss", "logit_mse", "task"), block_lengths=(2,), iterative_drops=2
    ),
    "taylor, paper": _stage(layer_metrics=(), method="taylor", convention="paper"),
}
SCORE_LAYOUTS = {
    "one": Parallel(micro_batch_size=4),
    "tp2 with sequence parallel": Parallel(tp=2, sequence_parallel=True, micro_batch_size=2),
    "pp3, uneven": Parallel(pp=3, micro_batch_size=2),
}


@pytest.fixture(scope="module")
def expected_scores(root: Path) -> dict[tuple[str, str], dict[str, NDArray]]:
    models = {case: root / "models" / case for case in ("llama_gqa_tied", "nemotron")}
    layout = Parallel(micro_batch_size=4)
    return run_ranks(1, scores_of, models, root / "data", layout, root / "work", SCORES)[0]


@pytest.mark.parametrize("name", SCORE_LAYOUTS)
def test_scores_and_removals_are_those_of_gpt_model(
    name: str, root: Path, expected_scores: dict[tuple[str, str], dict[str, NDArray]]
) -> None:
    layout = SCORE_LAYOUTS[name]
    models = {case: root / "models" / case for case, _ in expected_scores}
    ranks = run_ranks(layout.world_size, _as_hybrid, scores_of, models, root / "data", layout, root / "work", SCORES)
    for found in ranks:
        assert found.keys() == expected_scores.keys()
        for case, scores in expected_scores.items():
            assert found[case].keys() == scores.keys()
            for what, score in scores.items():
                np.testing.assert_allclose(
                    found[case][what], score, rtol=1e-10, atol=1e-10 * np.abs(score).max(), err_msg=f"{case} {what}"
                )


# A fixed weight: the dynamic one depends on the size of micro-batches.
HIDDEN = {
    "logits": {},
    "hidden": {"pairs": [[-1, -1], [1, 2]], "states": ["mlp_input", "block_output"], "weight": 0.02},
}
TRAININGS = {
    "one": (Parallel(micro_batch_size=4), {}),
    "hidden states, tp2": (Parallel(tp=2), {"loss": HIDDEN}),
    "tp2, layers recomputed": (Parallel(tp=2, recompute="full"), {}),
    "hidden states, pp2": (Parallel(pp=2), {"loss": HIDDEN}),
    "cp2": (Parallel(cp=2, micro_batch_size=2), {}),
    "dp2, distributed optimizer": (Parallel(dp=2, distributed_optimizer=True), {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return distill_folders(tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="module")
def expected_losses(folders: dict[str, Path]) -> Callable[[dict[str, Any]], list[float]]:
    known: dict[str, list[float]] = {}

    def of(keys: dict[str, Any]) -> list[float]:
        if repr(keys) not in known:
            work = folders["work"] / f"gpt{len(known)}"
            work.mkdir()
            arguments = (Parallel(micro_batch_size=4), *_models(folders), work)
            known[repr(keys)] = run_ranks(1, distill_losses, _params(keys), *arguments)[0][0]
        return known[repr(keys)]

    return of


def _params(keys: dict[str, Any]) -> Any:
    return type(TWENTY_STEPS).model_validate({**TWENTY_STEPS.model_dump(), **keys})


def _models(folders: dict[str, Path]) -> list[Path]:
    return [folders[key] for key in ("student", "teacher", "data")]


@pytest.mark.parametrize("name", TRAININGS)
def test_a_distillation_has_the_losses_of_gpt_model_and_resumes_from_a_checkpoint(
    name: str, folders: dict[str, Path], expected_losses: Callable[[dict[str, Any]], list[float]], tmp_path: Path
) -> None:
    layout, keys = TRAININGS[name]
    expected = expected_losses(keys)
    assert expected[-1] < 0.8 * expected[0], "the student must learn for this to mean anything"
    _run(layout, distill_until, _params(keys), *_models(folders), tmp_path, 7)
    found = _run(layout, distill_until, _params(keys), *_models(folders), tmp_path, 20)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_training_does_not_resume_with_another_class(folders: dict[str, Path], tmp_path: Path) -> None:
    """The tensors in Megatron's checkpoints of the two classes have different names."""
    arguments = (Parallel(micro_batch_size=4), *_models(folders), tmp_path)
    run_ranks(1, distill_until, TWENTY_STEPS, *arguments, 3)
    with pytest.raises(AssertionError, match=r"CheckpointError: The training checkpoint cannot be read"):
        run_ranks(1, _as_hybrid, distill_until, TWENTY_STEPS, *arguments, 6)


def test_hidden_states_of_recomputed_layers_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    layout = Parallel(micro_batch_size=4, recompute="full")
    with pytest.raises(AssertionError, match="Hidden states of a HybridModel have no gradients"):
        _run(layout, distill_until, _params({"loss": HIDDEN}), *_models(folders), tmp_path, 2)
