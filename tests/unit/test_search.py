"""The grid, its constraints and the ranking, computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nemo_minitron.api import load_plan, load_recipe
from nemo_minitron.errors import ArtifactError, MinitronError, PlanError
from nemo_minitron.families import ModelShape, num_params, read_shape
from nemo_minitron.plan.planner import expanded
from nemo_minitron.pruning.possible import impossible, selection_for
from nemo_minitron.pruning.search import (
    decode_ms,
    enumerate_candidates,
    kendall_tau,
    kv_cache_bytes,
    memory_gib,
    ranking,
    read_search,
    winner_of,
    write_search,
)
from nemo_minitron.schema.execution import Execution
from nemo_minitron.schema.pruning import ReconstructionScoring, Scoring, Selection, SelectionRules, Target
from nemo_minitron.schema.search import Hardware, SearchConstraints, SearchGrid
from nemo_minitron.stages.artifacts import CandidateModel, Model
from nemo_minitron.stages.common.scoring_rules import scoring_problems
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.search.expansion import points_of, search_of
from nemo_minitron.stages.search.params import CandidateStage, SearchStage
from nemo_minitron.stages.search.run import Inputs, search
from nemo_minitron.system.progress import Progress
from tests.conftest import REPO

SOURCE: ModelShape = read_shape(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 100,
    }
)
ANY = SearchConstraints()


def _names(grid: dict[str, Any], constraints: SearchConstraints = ANY) -> list[tuple[int, ...]]:
    found = enumerate_candidates(SearchGrid(**grid), constraints, SOURCE)
    return [
        (c.shape.num_layers, c.shape.hidden_size, c.shape.ffn_hidden_size, c.shape.num_attention_heads) for c in found
    ]


def test_every_combination_is_a_point_and_what_is_left_out_stays() -> None:
    assert _names({"num_layers": (2, 3), "hidden_size": (32, 48)}) == [
        (2, 32, 128, 8),
        (2, 48, 128, 8),
        (3, 32, 128, 8),
        (3, 48, 128, 8),
    ]


def test_expansions_are_of_each_hidden_size() -> None:
    assert _names({"hidden_size": (32, 48), "ffn_expansion": (1.5, 2)}) == [
        (4, 32, 48, 8),
        (4, 32, 64, 8),
        (4, 48, 72, 8),
        (4, 48, 96, 8),
    ]
    with pytest.raises(ValidationError, match="not both"):
        SearchGrid(ffn_hidden_size=(8,), ffn_expansion=(1.0,))


def test_a_size_twice_in_a_grid_is_refused() -> None:
    with pytest.raises(ValidationError, match="hidden_size has 48 twice"):
        SearchGrid(hidden_size=(48, 32, 48))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.search.grid.hidden_size=[48,72]", r"search\.grid\.hidden_size has 72: above 64, the size of teacher"),
        (
            "stages.search.retraining.loss.hidden={pairs:[[3,3]]}",
            r"retraining\.loss\.hidden\.pairs\.0: the student has",
        ),
        (
            "stages.select.layer_metric=block_influence",
            r"select\.layer_metric = block_influence: stages\.search\.selec",
        ),
        ("stages.search.selection.ranking=network", r"select\.ranking = per_layer: stages\.search\.selection\.ranking"),
        (
            "stages.search.inputs.scores=other",
            r"select\.inputs\.scores = score: stages\.search\.inputs\.scores is other",
        ),
        ("stages.search.selection.method=random stages.select.inputs.scores=null", "importance needs a score stage"),
        ("stages.search.selection={method:random,layer_metric:logit_mse}", ""),
        (
            "stages.search.retraining.global_batch_size=10",
            r"search\.retraining\.global_batch_size = 10: must be a multiple of dp \* micro_batch_size = 1 \* 4 = 4",
        ),
        (
            "stages.search.retraining.global_batch_size=10 execution.parallel_by_stage={search:{micro_batch_size:2}}",
            "",
        ),
        (
            "stages.search.retraining.warmup_steps=6",
            r"retraining\.warmup_steps = 6: must be below .*rungs\.0\.num_steps",
        ),
        (
            "stages.search.retraining.loss.hidden={pairs:[[0,0]]} execution.parallel.recompute=full",
            r"recompute = full: not supported with stages\.search\.retraining\.loss\.hidden",
        ),
        (
            "stages.search.retraining.seq_len_tokens=512",
            r"search\.retraining\.seq_len_tokens = 512: the teacher supports at most 256",
        ),
        (
            "stages.search.compensation={seq_len_tokens:512}",
            r"search\.compensation\.seq_len_tokens = 512: the teacher supports at most 256",
        ),
        (
            "stages.search.grid.ffn_hidden_size=[] stages.search.grid.ffn_expansion=[2,4]",
            r"ffn_expansion has 4: times hidden_size 56, 64 it is above 192, the ffn_hidden_size of teacher",
        ),
        (
            "stages.search.grid.ffn_hidden_size=[] stages.search.grid.ffn_expansion=[0.01]",
            r"ffn_expansion has 0\.01: times hidden_size 48 it is rounded to 0 neurons",
        ),
    ],
)
def test_mistakes_are_found_before_the_search(override: str, words: str, tmp_path: Path) -> None:
    other = "++stages.other={kind:score,layer_metrics:[lm_loss],seq_len_tokens:128}"
    options = [f"execution.run_root={tmp_path}", other, *override.split()]
    if not words:
        load_plan(REPO / "recipes/toy/search.yaml", options)
        return
    with pytest.raises(PlanError, match=words) as caught:
        load_plan(REPO / "recipes/toy/search.yaml", options)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert not any("search_l" in line for line in lines), "the keys are those of the search"
    assert len(lines) <= 2, "what is wrong with every candidate is reported once"


def test_points_that_cannot_be_cut_are_not_candidates() -> None:
    # Three heads do not fill two groups; the teacher has fewer than 160 neurons and 16 heads.
    assert _names({"num_attention_heads": (3, 4, 16), "ffn_hidden_size": (96, 160)}) == [(4, 64, 96, 4)]


def test_parameters_must_be_within_the_tolerance() -> None:
    sizes = {ffn: num_params(SOURCE.resized(ffn_hidden_size=ffn)) for ffn in (32, 64, 96, 128)}
    near = SearchConstraints(num_params=sizes[64], num_params_tolerance=0.01)
    assert _names({"ffn_hidden_size": tuple(sizes)}, near) == [(4, 64, 64, 8)]
    between = SearchConstraints(num_params_min=sizes[64], num_params_max=sizes[96])
    assert [found[2] for found in _names({"ffn_hidden_size": tuple(sizes)}, between)] == [64, 96]


def test_an_empty_grid_and_one_that_is_too_large_say_so() -> None:
    with pytest.raises(PlanError, match="None of the 1 points of the grid can be cut"):
        _names({"num_layers": (2,)}, SearchConstraints(num_params=1.0))
    with pytest.raises(PlanError, match="3 of the 3 points") as caught:
        _names({"num_layers": (1, 2, 3)}, SearchConstraints(max_candidates=2))
    assert caught.value.allowed == "at most 2"


def test_memory_and_time_by_hand() -> None:
    constraints = SearchConstraints(context_tokens=100, batch_size=3)
    # Key and value, 4 layers, 2 groups of 8 channels, 16 bits, 300 tokens.
    assert kv_cache_bytes(SOURCE, constraints) == 2 * 4 * 2 * 8 * 2 * 300
    total = 2 * num_params(SOURCE) + 76800
    assert memory_gib(SOURCE, constraints) == pytest.approx(total / 2**30)
    slow_memory = Hardware(memory_gb_per_s=1e-3, tflops=1e9, layer_overhead_us=50)
    read_bytes = total - 2 * 100 * 64  # the rows of the input embeddings are not read
    assert decode_ms(SOURCE, constraints, slow_memory) == pytest.approx(read_bytes / 1e6 * 1e3 + 4 * 0.05)
    slow_compute = Hardware(memory_gb_per_s=1e9, tflops=1e-6, layer_overhead_us=0)
    operations = 2 * (num_params(SOURCE) - 100 * 64) * 3
    assert decode_ms(SOURCE, constraints, slow_compute) == pytest.approx(operations / 1e6 * 1e3)


def test_memory_and_time_are_constraints_too() -> None:
    grid = {"num_layers": (2, 4)}
    limit = memory_gib(SOURCE.resized(num_layers=3), ANY)
    assert _names(grid, SearchConstraints(max_memory_gib=limit)) == [(2, 64, 128, 8)]
    slow = decode_ms(SOURCE.resized(num_layers=3), ANY, ANY.hardware)
    assert _names(grid, SearchConstraints(max_decode_ms=slow)) == [(2, 64, 128, 8)]


def _found(name: str, num_params: int, *losses: float | None) -> dict[str, Any]:
    return {"name": name, "num_params": num_params, "losses": list(losses)}


def test_who_came_further_is_first_then_the_lower_loss() -> None:
    ranked = ranking([_found("a", 9, 2.0), _found("b", 9, 3.0, 2.9), _found("c", 9, 3.0, 2.5), _found("d", 9, 1.9)])
    assert [found["name"] for found in ranked] == ["c", "b", "d", "a"]
    assert [found["rank"] for found in ranked] == [1, 2, 3, 4]


def test_losses_that_are_nan_are_last() -> None:
    ranked = ranking([_found("nan", 9, math.nan), _found("slow", 9, None), _found("good", 9, 5.0)])
    assert ranked[0]["name"] == "good"


def test_a_candidate_that_diverged_late_does_not_win_over_those_with_a_loss() -> None:
    ranked = ranking([_found("slow", 9, None), _found("late", 9, 2.0, None), _found("good", 9, 5.0)])
    assert [found["name"] for found in ranked] == ["good", "late", "slow"]


def test_the_name_of_a_candidate_does_not_depend_on_the_other_points() -> None:
    few, many = (
        {found.name: found.target for found in enumerate_candidates(SearchGrid(**grid), ANY, SOURCE)}
        for grid in (
            {"num_layers": (3,), "hidden_size": (48,)},
            {"num_layers": (2, 3), "hidden_size": (32, 48, 64)},
        )
    )
    assert few == {"l3_h48_f128": Target(num_layers=3, hidden_size=48, ffn_hidden_size=128)}
    assert len(many) == 6
    assert few.items() <= many.items()


def test_the_front_holds_what_nothing_smaller_beats() -> None:
    ranked = ranking(
        [_found("small", 5, 3.0), _found("worse", 6, 3.1), _found("large", 9, 2.0), _found("same", 9, 2.5)]
    )
    assert {found["name"] for found in ranked if found["on_pareto_front"]} == {"small", "large"}


def test_kendall_tau_by_hand() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall_tau([1], [1]) is None
    assert kendall_tau([1, 1], [1, 2]) is None


def test_the_winner_is_read_from_the_file_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    best = {"name": "c01", **SOURCE.sizes(), "num_params": 1, "losses": [1.0]}
    write_search({"candidates": [best]}, tmp_path)
    assert winner_of(tmp_path).ffn_hidden_size == 128
    (tmp_path / "search.json").write_text(json.dumps({"schema": 1, "candidates": []}))
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_search(tmp_path)


def test_a_candidates_name_leads_back_to_its_search() -> None:
    recipe = expanded(load_recipe(REPO / "recipes/toy/search.yaml", []))
    names = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, CandidateStage)}
    assert {stage.rung for stage in names.values()} == {1, 2}
    assert {search_of(name, stage) for name, stage in names.items()} == {"search"}


def test_heads_are_merged_only_where_some_are_cut() -> None:
    rules = SelectionRules(head_merge="mean")
    for target, expected in (
        (Target(hidden_size=32), "off"),
        (Target(num_attention_heads=8), "off"),
        (Target(num_attention_heads=4), "mean"),
        (Target(num_query_groups=1), "mean"),
    ):
        selection = selection_for(rules, target, SOURCE)
        assert selection.head_merge == expected
        assert not list(impossible(selection, SOURCE))


def test_unchanged_widths_and_a_run_of_one_layer_need_no_scores_of_their_own() -> None:
    scoring = Scoring(width_axes=(), layer_metrics=("lm_loss",))
    whole = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 8}
    keys: dict[str, Any] = {"layer_metric": "lm_loss", "layer_removal": "contiguous"}

    def problems(**target: int) -> list[str]:
        selection = Selection(target=Target(**{**whole, **target}), **keys)
        return list(scoring_problems("stages.search", selection, "score", scoring, SOURCE, in_search=True))

    assert problems(num_layers=3) == []
    assert "blocks of 2 layers are not scored" in problems(num_layers=2)[0]
    assert "stages.search.selection.layer_removal" in problems(num_layers=2)[0]
    assert problems(hidden_size=32)[0].startswith("stages.search.grid: axis hidden is not scored")


def test_a_stage_that_scores_no_layers_is_named_without_keys_that_it_does_not_have() -> None:
    selection = Selection(target=Target(num_layers=2))
    for in_search in (False, True):
        given = ("stages.x", selection, "ranks", ReconstructionScoring(), SOURCE)
        (problem,) = scoring_problems(*given, in_search=in_search)
        assert problem.startswith("stages.x.inputs.scores = ranks: it has no scores of layers")
        assert ("drop_layers" in problem) != in_search


@pytest.mark.parametrize(
    ("diverged", "message"),
    [
        ((False, False), r"(?s)none was trained.*at most 3\.0"),
        ((True, False), "1 of 2 candidates diverged; the others are slower than min_generate_tokens_per_s"),
        ((True, True), "2 of 2 candidates diverged, so there is no winner"),
    ],
)
def test_a_search_without_a_trained_candidate_has_no_winner(
    diverged: tuple[bool, bool], message: str, tmp_path: Path
) -> None:
    grid = {"hidden_size": (32, 48)}
    params = SearchStage.model_validate({
        "kind": "search", "grid": grid, "measure_speed": {}, "constraints": {"min_generate_tokens_per_s": 9.0},
        "retraining": {"lr": 1e-3, "seq_len_tokens": 8, "global_batch_size": 1}, "rungs": [{"num_steps": 1}],
    })  # fmt: skip
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = Model("teacher", "import", tmp_path, "", {})
    slow = {"zero_shot_loss": None, "losses": [None], "generate_tokens_per_s": 3.0}
    names = [candidate.name for candidate in points_of("search", params, model.shape)]
    candidates = {
        name: CandidateModel(name, "candidate", tmp_path, "", {"candidate": name, "diverged": failed, **slow})
        for name, failed in zip(names, diverged, strict=True)
    }
    ctx = StageContext("search", "test", tmp_path, tmp_path, Execution(), Progress(silent=True))
    with pytest.raises(MinitronError, match=message):
        search(params, Inputs(model, candidates), ctx)
