"""Every score, and the plan that is made from it, is the same in every parallel layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.selection import choose_keep
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.score.params import ScoreStage
from nemo_minitron.stages.select.params import SelectStage
from tests.support.distributed import run_ranks
from tests.support.megatron_ranks import scores_of
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import FAMILY_CASES, tiny_model_dir

RTOL = {"fp32": 1e-5, "fp64": 1e-10}
LAYOUTS = {
    "tp2": Parallel(tp=2, micro_batch_size=2),
    "tp4": Parallel(tp=4, micro_batch_size=8),
    "pp2": Parallel(pp=2),
    "pp3, uneven": Parallel(pp=3, micro_batch_size=2),
    "dp2": Parallel(dp=2, micro_batch_size=4),
    "tp2 dp2": Parallel(tp=2, dp=2),
    "tp2 pp2 with sequence parallel": Parallel(tp=2, pp=2, sequence_parallel=True, micro_batch_size=2),
}
METRICS = ("block_influence", "lm_loss", "logit_mse", "task")


def _stage(**keys: Any) -> ScoreStage:
    return ScoreStage.model_validate({"kind": "score", "num_samples": 8, "seq_len_tokens": 32, **keys})


CASES = {
    precision: (precision, _stage(layer_metrics=METRICS, block_lengths=(2, 3), iterative_drops=2))
    for precision in ("fp32", "fp64")
}
MORE_CASES = {
    f"{name} {precision}": (precision, _stage(layer_metrics=(), **keys))
    for precision in ("fp32", "fp64")
    for name, keys in {
        "paper": {"convention": "paper"},
        "taylor": {"method": "taylor"},
        "wanda": {"method": "wanda"},
        "taylor, paper": {"method": "taylor", "convention": "paper"},
        "l2, var": {"batch_aggregation": "var", "sequence_aggregation": "l2"},
    }.items()
}
FAST_FAMILIES = ("llama_gqa_tied", "nemotron")
FAST_LAYOUTS = ("pp3, uneven", "dp2", "tp2 pp2 with sequence parallel")
Found = dict[tuple[str, str], dict[str, NDArray]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scores")
    tiny_data_dir(root / "data")
    for case in FAMILY_CASES:
        tiny_model_dir(root / "models", case)
    return root


@cache
def _run(parallel: Parallel, root: Path, families: tuple[str, ...]) -> list[Found]:
    """On every rank."""
    models = {case: root / "models" / case for case in families}
    cases = {**CASES, **MORE_CASES}
    return run_ranks(parallel.world_size, scores_of, models, root / "data", parallel, root / "work", cases)


@pytest.mark.parametrize("layout", FAST_LAYOUTS)
def test_scores_and_plans_are_those_of_one_process(layout: str, root: Path) -> None:
    _compare(layout, root, FAST_FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_they_are_for_every_family(layout: str, root: Path) -> None:
    _compare(layout, root, tuple(FAMILY_CASES))


def _compare(layout: str, root: Path, families: tuple[str, ...]) -> None:
    expected = _run(Parallel(micro_batch_size=4), root, families)[0]
    for found in _run(LAYOUTS[layout], root, families):
        assert found.keys() == expected.keys()
        for (model, case), scores in found.items():
            rtol = RTOL[case.split()[-1]]
            assert scores.keys() == expected[model, case].keys()
            for name, score in scores.items():
                one = expected[model, case][name]
                # Relative to the whole axis, because a block influence near zero has no significant digits.
                np.testing.assert_allclose(
                    score, one, rtol=rtol, atol=rtol * np.abs(one).max(), err_msg=f"{model} {case} {name}"
                )
            assert _plans(root / "models" / model, scores) == _plans(root / "models" / model, expected[model, case])


def _plans(model_dir: Path, scores: dict[str, NDArray]) -> list[Any]:
    shape = Checkpoint.open(model_dir).shape
    loaded = {name: torch.from_numpy(score) for name, score in scores.items()}
    targets: list[dict[str, Any]] = [
        {"hidden_size": 40, "ffn_hidden_size": 48, "num_attention_heads": shape.num_query_groups}
        if shape.heads_per_group > 1
        else {"hidden_size": 40, "ffn_hidden_size": 48, "num_attention_heads": 4},
        {"num_query_groups": 2},
    ]
    plans = [_plan(loaded, shape, {"target": target}) for target in targets]
    if "layers.lm_loss" not in scores:
        return plans
    for metric in METRICS:
        for removal in ("individual", "contiguous", "iterative"):
            keys = {"layer_metric": metric, "layer_removal": removal, "target": {"num_layers": 2}}
            plans.append(_plan(loaded, shape, keys))
    return plans


def _plan(scores: dict[str, torch.Tensor], shape: Any, keys: dict[str, Any]) -> Any:
    return choose_keep(scores, shape, SelectStage.model_validate({"kind": "select", **keys}))
