"""The indices that are kept, and the file with the decision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_minitron.errors import ArtifactError, MinitronError, NumericsError, PlanError
from nemo_minitron.families import ModelShape, num_params, read_shape
from nemo_minitron.pruning.plan_file import (
    PLAN_FILE,
    PrunePlan,
    from_ranges,
    read_plan,
    require_uniform,
    to_ranges,
    write_plan,
)
from nemo_minitron.pruning.selection import choose_keep, top_indices
from nemo_minitron.schema.execution import Execution
from nemo_minitron.schema.pruning import Target
from nemo_minitron.stages.artifacts import Model, Scores
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.select.params import SelectStage
from nemo_minitron.stages.select.run import Inputs, select
from nemo_minitron.system.progress import Progress

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 32,
}
SOURCE: ModelShape = read_shape(CONFIG)
SCORES: dict[str, Tensor] = {
    "hidden": torch.tensor([5.0, 1.0, 4.0, 1.0, 3.0, 1.0, 2.0, 9.0]),
    "ffn": torch.tensor([[1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1], [1.0, 9, 1, 9, 1, 9], [0.0, 0, 0, 0, 0, 0]]),
    "heads": torch.tensor([[1.0, 2, 3, 9, 8, 7], [3.0, 2, 1, 7, 8, 9], [1.0, 1, 1, 2, 2, 2], [5.0, 0, 5, 0, 5, 0]]),
    "layers.block_influence": torch.tensor([0.9, 0.1, 0.2, 0.8]),
    "layers.lm_loss": torch.tensor([9.0, 3.0, 3.1, 2.9]),
}


def _params(method: str = "importance", **keys: Any) -> SelectStage:
    """Split keys into sizes, for the target, and all others, for the stage."""
    target = {key: keys.pop(key) for key in Target.model_fields if key in keys}
    return SelectStage.model_validate({"kind": "select", "target": target, "method": method, **keys})


def _choose(**keys: Any) -> PrunePlan:
    return choose_keep(SCORES, SOURCE, _params(**keys))


def test_hidden_keeps_the_best_channels_of_one_global_order_and_ties_go_to_the_lower_index() -> None:
    assert _choose(hidden_size=4).shared["hidden"] == (0, 2, 4, 7)
    assert _choose(hidden_size=6).shared["hidden"] == (0, 1, 2, 4, 6, 7)


def test_ffn_is_chosen_in_each_layer_by_itself() -> None:
    assert _choose(ffn_hidden_size=2).by_layer["ffn"] == {0: (4, 5), 1: (0, 1), 2: (1, 3), 3: (0, 1)}


def test_heads_are_chosen_within_each_query_group_the_same_number_in_all() -> None:
    # Groups are heads 0-2 and 3-5; in layer 0 the three best heads of all are in one group.
    assert _choose(num_attention_heads=2).by_layer["heads"] == {0: (2, 3), 1: (0, 5), 2: (0, 3), 3: (0, 4)}
    assert _choose(num_attention_heads=4).by_layer["heads"][0] == (1, 2, 3, 4)


def test_the_lowest_scored_layers_go() -> None:
    plan = _choose(num_layers=2)
    assert plan.layers == (0, 3)
    assert plan.by_layer["ffn"].keys() == plan.by_layer["heads"].keys() == {0, 3}
    assert _choose(num_layers=2, layer_metric="lm_loss").layers == (0, 2)


def test_a_contiguous_run_is_chosen_by_the_score_of_runs_of_its_length() -> None:
    scores = {"blocks.lm_loss.2": torch.tensor([3.0, 2.0, 2.0]), "layers.lm_loss": torch.tensor([3.0, 1.0, 2.0, 4.0])}
    keys = {"num_layers": 2, "layer_metric": "lm_loss", "layer_removal": "contiguous"}
    assert choose_keep(scores, SOURCE, _params(**keys)).layers == (0, 3), "of equal runs the first"
    assert choose_keep(scores, SOURCE, _params(**{**keys, "num_layers": 3})).layers == (0, 2, 3), "a run of one layer"
    with pytest.raises(ArtifactError, match=r"no score 'blocks.lm_loss.3'"):
        choose_keep(scores, SOURCE, _params(**{**keys, "num_layers": 1}))


def test_iterative_removal_takes_layers_in_the_order_in_which_they_went() -> None:
    scores = {"iterative.lm_loss": torch.tensor([4.0, 2.0, 1.0, 3.0])}
    keys = {"layer_metric": "lm_loss", "layer_removal": "iterative"}
    assert choose_keep(scores, SOURCE, _params(num_layers=3, **keys)).layers == (0, 1, 3)
    assert choose_keep(scores, SOURCE, _params(num_layers=2, **keys)).layers == (0, 3)


def test_query_groups_go_by_the_scores_of_all_their_heads() -> None:
    plan = _choose(num_query_groups=1)
    # Group 0 holds heads 0-2, group 1 heads 3-5.
    assert plan.by_layer["groups"] == {0: (1,), 1: (1,), 2: (1,), 3: (0,)}
    assert plan.by_layer["heads"] == {0: (3, 4, 5), 1: (3, 4, 5), 2: (3, 4, 5), 3: (0, 1, 2)}
    assert plan.target_shape(SOURCE).sizes()["num_attention_heads"] == 3
    both = _choose(num_query_groups=1, num_attention_heads=2)
    assert both.by_layer["heads"] == {0: (3, 4), 1: (4, 5), 2: (3, 4), 3: (0, 2)}


def test_without_shared_keys_the_groups_go_with_the_heads() -> None:
    source = SOURCE.resized(num_query_groups=6)
    plan = choose_keep(SCORES, source, _params(num_attention_heads=4))
    assert plan.by_layer["groups"] == plan.by_layer["heads"]
    assert plan.by_layer["heads"][0] == (2, 3, 4, 5)


def test_network_ranking_keeps_the_same_neurons_in_every_layer() -> None:
    plan = _choose(ffn_hidden_size=2, ranking="network")
    # Columns of SCORES["ffn"] add up to 8, 16, 8, 16, 8, 16.
    assert set(plan.by_layer["ffn"].values()) == {(1, 3)}


def test_cut_heads_are_merged_into_the_least_important_kept_ones_of_their_group() -> None:
    plan = _choose(num_attention_heads=4, head_merge="printed")
    # Layer 0, group 0: 2 > 1 > 0, so head 0 goes into head 1; group 1: 3 > 4 > 5.
    assert plan.merged[0] == {1: 0, 4: 5}
    assert _choose(num_attention_heads=2, head_merge="printed").merged[0] == {2: 1, 3: 4}
    assert _choose(num_attention_heads=4).merged == {}


def test_named_layers_are_dropped_without_any_score() -> None:
    assert choose_keep({}, SOURCE, _params(drop_layers=[1, 2])).layers == (0, 3)
    assert choose_keep({}, SOURCE, _params(drop_layers=[2], num_layers=3)).layers == (0, 1, 3)


def test_an_axis_without_a_target_stays_whole_and_needs_no_score() -> None:
    plan = choose_keep({}, SOURCE, _params(ffn_hidden_size=6))
    assert plan.layers == (0, 1, 2, 3)
    assert plan.shared["hidden"] == tuple(range(8))
    assert set(plan.by_layer["ffn"].values()) == set(plan.by_layer["heads"].values()) == {(0, 1, 2, 3, 4, 5)}
    assert plan.target_shape(SOURCE) == SOURCE


def test_order_of_scores_that_differ_beyond_fp32_is_exact() -> None:
    scores = torch.tensor([1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64)
    assert top_indices(scores, 1) == (1,)


def test_the_random_control_has_the_shape_of_the_target_and_depends_on_the_seed_only() -> None:
    target = {"hidden_size": 4, "ffn_hidden_size": 3, "num_attention_heads": 2, "num_layers": 3}
    one = choose_keep({}, SOURCE, _params("random", seed=1, **target))
    again = choose_keep(SCORES, SOURCE, _params("random", seed=1, **target))
    other = choose_keep({}, SOURCE, _params("random", seed=2, **target))
    assert one == again != other
    assert one.target_shape(SOURCE) == choose_keep(SCORES, SOURCE, _params(**target)).target_shape(SOURCE)
    assert len(set(one.by_layer["ffn"].values())) > 1, "each layer draws for itself"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    scores = {**SCORES, "ffn": SCORES["ffn"].clone()}
    scores["ffn"][2, 3] = bad
    with pytest.raises(NumericsError, match="'ffn' contains NaN or infinity"):
        choose_keep(scores, SOURCE, _params(ffn_hidden_size=2))


def test_layers_of_different_sizes_can_be_planned_but_not_cut(tmp_path: Path) -> None:
    write_plan(_choose(hidden_size=4, ffn_hidden_size=2), SOURCE, tmp_path)
    _edit(tmp_path, lambda d: d["keep"]["ffn"].update({"0": "0-2"}))
    plan = read_plan(tmp_path, SOURCE)
    assert [len(plan.by_layer["ffn"][layer]) for layer in plan.layers] == [3, 2, 2, 2]
    with pytest.raises(ArtifactError, match=r"keep.ffn has layers of different sizes: \{0: 3, 1: 2"):
        require_uniform(plan, "here")


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "wider than the teacher": ({"hidden_size": 9}, "target.hidden_size = 9"),
    "deeper than the teacher": ({"num_layers": 5}, "target.num_layers = 5"),
    "heads that do not fill the groups": ({"num_attention_heads": 3}, "target.num_attention_heads = 3"),
    "more heads than the groups hold": ({"num_query_groups": 1, "num_attention_heads": 5}, "num_attention_heads = 5"),
    "merging without cutting": ({"hidden_size": 4, "head_merge": "printed"}, "head_merge = printed"),
    "a layer that is not there": ({"drop_layers": [4]}, "drop_layers"),
    "every layer": ({"drop_layers": [0, 1, 2, 3]}, "drop_layers"),
    "two different depths": ({"drop_layers": [1], "num_layers": 2}, "target.num_layers = 2"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_targets_that_cannot_be_cut_out_are_refused(case: str) -> None:
    keys, word = IMPOSSIBLE[case]
    with pytest.raises(PlanError, match="cannot be cut out") as caught:
        _choose(**keys)
    assert word in caught.value.what
    assert caught.value.allowed


def test_missing_scores_and_scores_of_another_model_are_refused() -> None:
    with pytest.raises(ArtifactError, match="no score 'hidden'"):
        choose_keep({}, SOURCE, _params(hidden_size=4))
    with pytest.raises(ArtifactError, match=r"'hidden' has shape \[7\]; this model's would have \[8\]"):
        choose_keep({"hidden": torch.ones(7)}, SOURCE, _params(hidden_size=4))


# --- the file -----------------------------------------------------------------------------------


def test_ranges_are_compact_and_round_trip() -> None:
    for indices, text in (
        ((0, 1, 2, 5), "0-2,5"),
        ((3,), "3"),
        ((0, 2, 4), "0,2,4"),
        ((0, 1), "0-1"),
        (tuple(range(100)), "0-99"),
    ):
        assert to_ranges(indices) == text
        assert from_ranges(text) == indices
    assert from_ranges("all", 3) == (0, 1, 2)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,1", "2,1", "0-3,3", "-1", "0-8", "0-99999999999", "all-1"])
def test_ranges_that_are_not_ascending_or_too_large_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_ranges(text, 8)


def test_a_plan_round_trips(tmp_path: Path) -> None:
    plan = _choose(hidden_size=4, ffn_hidden_size=2, num_attention_heads=2, num_layers=3)
    document = write_plan(plan, SOURCE, tmp_path)
    assert read_plan(tmp_path, SOURCE) == plan
    target = plan.target_shape(SOURCE)
    assert document["num_params"] == {"source": num_params(SOURCE), "target": num_params(target)}
    assert document["keep"]["hidden"] == "0,2,4,7"
    assert document["target"]["kv_channels"] == SOURCE.kv_channels


def test_all_means_a_whole_axis(tmp_path: Path) -> None:
    plan = _choose(num_layers=3)
    write_plan(plan, SOURCE, tmp_path)
    _edit(tmp_path, lambda d: d["keep"].update(hidden="all", ffn="all", heads={str(i): "all" for i in plan.layers}))
    assert read_plan(tmp_path, SOURCE) == plan


def _edit(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / PLAN_FILE).read_text())
    edit(document)
    (folder / PLAN_FILE).write_text(json.dumps(document))


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "of another schema": (lambda d: d.update(schema=2), "cannot be read"),
    "without keep lists": (lambda d: d.pop("keep"), "cannot be read"),
    "of another model": (lambda d: d["source"].update(hidden_size=16), "was made for"),
    "index too large": (lambda d: d["keep"].update(hidden="0-2,8"), "below 8"),
    "index twice": (lambda d: d["keep"].update(hidden="0,1,1,2"), "ascending"),
    "not a list": (lambda d: d["keep"].update(hidden=4), "is not valid"),
    "layer without neurons": (lambda d: d["keep"]["ffn"].pop("0"), "is not valid"),
    "heads of a group that goes": (lambda d: d["keep"]["groups"].update({"0": "1"}), "keep.groups.0 is 1"),
    "merging that there is not": (lambda d: d.update(head_merge="twice"), "head_merge 'twice'"),
    "groups of different sizes": (lambda d: d["keep"]["heads"].update({"0": "0,1"}), "keep.heads.0 keeps different"),
    "target that does not fit": (lambda d: d["keep"].update(hidden="0-4"), "The keep lists leave"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_an_edited_plan_that_makes_no_sense_is_refused(case: str, tmp_path: Path) -> None:
    spoil, message = SPOILT[case]
    write_plan(_choose(hidden_size=4, ffn_hidden_size=2, num_attention_heads=2), SOURCE, tmp_path)
    _edit(tmp_path, spoil)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_plan(tmp_path, SOURCE)
    assert caught.value.where == str(tmp_path / PLAN_FILE)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_plan_file_that_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / PLAN_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_plan(tmp_path, SOURCE)


def test_the_select_stage_writes_the_plan_and_reports_its_size(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folders = {name: tmp_path / name for name in ("model", "scores", "out", "work")}
    for folder in folders.values():
        folder.mkdir()
    (folders["model"] / "config.json").write_text(json.dumps(CONFIG))
    save_file(SCORES, folders["scores"] / "scores.safetensors")
    model = Model("teacher", "import", folders["model"], "", {})
    scores = Scores("score", "score", folders["scores"], "", {})
    context = StageContext("select", "toy", folders["out"], folders["work"], Execution(), Progress(silent=True))
    result = select(_params(ffn_hidden_size=2), Inputs(model, scores), context)
    plan = read_plan(folders["out"], SOURCE)
    assert plan == _choose(ffn_hidden_size=2)
    assert result["num_params"] == num_params(plan.target_shape(SOURCE))
    assert result["share"] == result["num_params"] / num_params(SOURCE)
    with pytest.raises(MinitronError):
        select(_params(ffn_hidden_size=7), Inputs(model, scores), context)
