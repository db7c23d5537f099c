"""The registry of axes agrees with recipes, tables and scores; families and layers are records."""

from __future__ import annotations

import ast
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from nemo_minitron.cli.plan import _sizes
from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import Row, num_params, parameters, read_shape, rows, write_config
from nemo_minitron.families.axes import (
    AXES,
    FFN,
    FIXED_AXES,
    GROUPS,
    HEADS,
    SCORED_WIDTH_AXES,
    SPLIT_LABELS,
    WIDTH_AXES,
    chosen_by,
)
from nemo_minitron.families.blocks import ATTENTION, MLP, Block, Layer
from nemo_minitron.families.family import SWIGLU_DEFAULTS, Family
from nemo_minitron.families.registry import FAMILIES, axes_of, layers_of, width_axes
from nemo_minitron.families.shape import SIZE_COLUMNS, ModelShape
from nemo_minitron.families.split import params_of_rank
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.search import FFN_EXPANSION
from nemo_minitron.pruning.selection import choose_keep
from nemo_minitron.pruning.slicing import prune_checkpoint
from nemo_minitron.schema.pruning import Scoring, Selection, Target
from nemo_minitron.schema.search import SearchGrid
from nemo_minitron.stages.score_reconstruction.run import _SITES_OF_AXIS
from nemo_minitron.system.progress import Progress
from nemo_minitron.workload.memory import BLOCK_BYTES
from tests.conftest import REPO
from tests.support.tiny_models import FAMILY_CASES, tiny_config, tiny_model_dir

PACKAGE = REPO / "nemo_minitron"
CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
MADE_UP = Family(
    name="made_up",
    architecture="MadeUpForCausalLM",
    defaults={**SWIGLU_DEFAULTS, "max_position_embeddings": 4096},
    qkv_bias=True,
    qk_norm=True,
)


def test_recipes_have_a_key_for_each_axis() -> None:
    keys = {axis.target_key for axis in AXES}
    assert set(Target.model_fields) == keys
    assert set(SearchGrid.model_fields) == keys | {FFN_EXPANSION}
    names = {axis.name for axis in SCORED_WIDTH_AXES}
    assert set(get_args(get_args(Scoring.model_fields["width_axes"].annotation)[0])) == names
    assert set(Scoring(seq_len_tokens=1).width_axes) == names


def test_each_label_of_a_parameter_belongs_to_one_axis() -> None:
    owners = Counter(label for axis in (*WIDTH_AXES, *FIXED_AXES) for label in axis.coupled)
    assert set(owners.values()) == {1}
    for case in FAMILY_CASES:
        shape = read_shape(tiny_config(case).to_dict() | {"architectures": None})
        assert {label for row in rows(shape) for label in row.axes} <= set(owners) == set(shape.axis_sizes())


def test_tensor_parallelism_splits_the_dimensions_that_megatron_splits() -> None:
    assert {"vocab", "q", "kv", "ffn"} == SPLIT_LABELS


def test_an_axis_that_holds_another_comes_before_it_and_is_chosen_by_its_scores() -> None:
    assert WIDTH_AXES.index(GROUPS) < WIDTH_AXES.index(HEADS)
    assert chosen_by(HEADS) == (HEADS, GROUPS)
    assert chosen_by(FFN) == (FFN,)
    decided = [axis for scored in SCORED_WIDTH_AXES for axis in chosen_by(scored)]
    assert set(decided) == set(WIDTH_AXES), "some axis could never be cut"


def test_each_scored_axis_has_a_tap() -> None:
    from nemo_minitron.backends.megatron.scoring.stats import TAPS

    assert set(TAPS) == {axis.scored_at for axis in SCORED_WIDTH_AXES}


def test_the_memory_of_each_block_is_known() -> None:
    shapes = [read_shape({**CONFIG, "architectures": [family.architecture]}) for family in FAMILIES.values()]
    assert {block for shape in shapes for layer in layers_of(shape) for block in layer} <= set(BLOCK_BYTES)


# --- families -----------------------------------------------------------------------------------


def test_a_llama_like_family_is_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config.json of the family is read and written, parameters are counted, and a checkpoint is pruned."""
    source = tiny_model_dir(tmp_path, "llama_gqa_tied")
    config = {**json.loads((source / "config.json").read_text()), "architectures": ["MadeUpForCausalLM"]}
    config["model_type"] = "made_up"
    with pytest.raises(CheckpointError, match="MadeUpForCausalLM"):
        read_shape(config)
    monkeypatch.setitem(FAMILIES, "made_up", replace(MADE_UP, qkv_bias=False, qk_norm=False))
    (source / "config.json").write_text(json.dumps(config))
    shape = Checkpoint.open(source).shape
    assert read_shape(write_config({}, shape) | {"max_position_embeddings": 256, "rms_norm_eps": 1e-6}) == shape
    selection = Selection(method="random", target=Target(hidden_size=40, ffn_hidden_size=56, num_layers=3))
    (tmp_path / "student").mkdir()
    target = prune_checkpoint(source, choose_keep({}, shape, selection), tmp_path / "student", Progress(silent=True))
    student = Checkpoint.open(tmp_path / "student")
    assert student.shape == target
    assert (target.family, student.config["architectures"]) == ("made_up", ["MadeUpForCausalLM"])


def test_features_of_a_family_are_fields_of_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "made_up", MADE_UP)
    names = {row.hf.rsplit("layers.{layer}.")[-1] for row in rows(read_shape({**CONFIG, "model_type": "made_up"}))}
    assert {"self_attn.q_proj.bias", "self_attn.q_norm.weight", "mlp.gate_proj.weight"} <= names


def test_families_are_named_in_their_own_modules_only() -> None:
    """A new family is a module, a line in the registry, and a test case."""
    names = {*FAMILIES, *(family.architecture for family in FAMILIES.values())}
    folders = ("families", "pruning", "distillation", "workload", "plan", "evaluation", "stages", "backends/megatron")
    for folder in folders:
        for file in (PACKAGE / folder).rglob("*.py"):
            found = {
                node.value
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
            }
            assert not found or (folder == "families" and file.stem in FAMILIES), (file, found)


def test_each_family_has_a_test_case() -> None:
    assert {case["model_type"] for case in FAMILY_CASES.values()} == set(FAMILIES)


# --- layers that differ, and experts ----------------------------------------------------------------


def _expert_rows(shape: ModelShape) -> tuple[Row, ...]:
    hf, megatron = "model.layers.{layer}.mlp.experts.{expert}", "decoder.layers.{layer}.mlp.experts.{expert}"
    return (
        Row("model.layers.{layer}.mlp.router.weight", ("hidden",), "decoder.layers.{layer}.mlp.router.weight"),
        Row(f"{hf}.up_proj.weight", ("ffn", "hidden"), f"{megatron}.linear_fc1.weight", num_experts=3),
        Row(f"{hf}.down_proj.weight", ("hidden", "ffn"), f"{megatron}.linear_fc2.weight", num_experts=3),
    )


EXPERTS = Block("experts", (FFN,), _expert_rows, lambda shape, seq_len_tokens: 0.0)
MIXER = Block("mixer", (), lambda shape: (Row("model.layers.{layer}.mixer.weight", ("hidden",), "m"),), lambda *_: 0.0)


def _mixed_layers(shape: ModelShape) -> tuple[Layer, ...]:
    """Return layers with attention and an MLP, with a mixer only, and with attention and experts."""
    return ((ATTENTION, MLP), (MIXER,), *((ATTENTION, EXPERTS),) * (shape.num_layers - 2))


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> ModelShape:
    monkeypatch.setitem(FAMILIES, "mixed", replace(MADE_UP, name="mixed", layers=_mixed_layers))
    return read_shape({**CONFIG, "model_type": "mixed"})


def test_rows_are_indexed_by_layer_and_by_expert(mixed: ModelShape) -> None:
    names = {parameter.hf for parameter in parameters(mixed)}
    places = {name.split(".")[2] for name in names if ".up_proj" in name and ".experts." not in name}
    assert places == {"0"}
    experts = sorted(name for name in names if name.endswith("experts.2.up_proj.weight"))
    assert experts == [f"model.layers.{layer}.mlp.experts.2.up_proj.weight" for layer in (2, 3)]
    assert {name.split(".")[2] for name in names if ".q_proj.weight" in name} == {"0", "2", "3"}
    assert not any("{" in parameter.hf + parameter.megatron for parameter in parameters(mixed))


def test_parameters_of_mixed_layers_are_counted_as_they_are_listed(mixed: ModelShape) -> None:
    from nemo_minitron.families import tensor_shape

    listed = 0
    for parameter in parameters(mixed):
        size = 1
        for length in tensor_shape(mixed, parameter.row):
            size *= length
        listed += size
    assert num_params(mixed) == listed
    assert sum(params_of_rank(mixed, tp=1, pp=2, stage=stage) for stage in (0, 1)) == listed


def test_axes_are_selected_in_the_layers_that_have_them(mixed: ModelShape) -> None:
    assert axes_of(mixed, 1) == ()
    assert axes_of(mixed, 2) == width_axes(mixed)[1:] == (FFN, GROUPS, HEADS)
    plan = choose_keep({}, mixed, Selection(method="random", target=Target(ffn_hidden_size=8, num_attention_heads=4)))
    assert plan.by_layer["ffn"].keys() == plan.by_layer["heads"].keys() == {0, 2, 3}
    assert {len(kept) for kept in plan.by_layer["ffn"].values()} == {8}


# --- no other list of axes ------------------------------------------------------------------------

LISTS_SIZES = ("families", "hf", "backends")
"""Folders that spell out the fields of a shape: the registry, and the names of config.json, GGUF and Megatron."""


def test_sizes_are_listed_from_the_registry() -> None:
    """Tables and messages iterate SIZE_AXES or SIZE_COLUMNS, so that they show a new axis too."""
    keys = {axis.target_key for axis in (*AXES, *FIXED_AXES)}
    found = {}
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] not in LISTS_SIZES:
            texts = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
            named = keys & {text for text in texts if isinstance(text, str)}
            if len(named) > 1:
                found[file] = named
    assert not found


def test_columns_of_sizes_have_each_axis_once() -> None:
    assert [[axis.name for axis in column] for column in SIZE_COLUMNS] == [
        ["layers"],
        ["hidden"],
        ["ffn"],
        ["heads", "groups"],
    ]
    assert {axis for column in SIZE_COLUMNS for axis in column} == set(AXES)


def test_plan_prints_the_sizes_of_a_model() -> None:
    shape = read_shape({**CONFIG, "architectures": ["LlamaForCausalLM"]})
    assert _sizes(shape.sizes()) == "4 layers, hidden 64, ffn 96, heads 8/4 groups of 8"


def test_each_scored_axis_has_its_sites_in_a_ranking_by_reconstruction() -> None:
    assert set(_SITES_OF_AXIS) == {axis.name for axis in SCORED_WIDTH_AXES}
