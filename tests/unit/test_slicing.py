"""Cutting checkpoints: the files that are written, and no others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.errors import ArtifactError, NumericsError
from nemo_minitron.families import Row, num_params, parameters, read_shape
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning import slicing
from nemo_minitron.pruning.plan_file import PrunePlan, write_plan
from nemo_minitron.pruning.positions import expand, kept_positions
from nemo_minitron.pruning.selection import choose_keep
from nemo_minitron.pruning.slicing import prune_checkpoint, slice_parameter
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.artifacts import Model, PrunePlanArtifact
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.prune.params import PruneStage
from nemo_minitron.stages.prune.run import Inputs, prune
from nemo_minitron.stages.select.params import SelectStage
from nemo_minitron.system.progress import Progress
from tests.support.tiny_models import FAMILY_CASES, load_transformers, tiny_model_dir

SILENT = Progress(silent=True)


def _plan(source_dir: Path, seed: int = 3, **more: int) -> PrunePlan:
    """Return a random plan that cuts every axis of the model, query groups only if `more` has them."""
    shape = Checkpoint.open(source_dir).shape
    heads = max(shape.num_query_groups, shape.num_attention_heads // 2)
    target = {"num_layers": 3, "hidden_size": 40, "ffn_hidden_size": 56, "num_attention_heads": heads, **more}
    params = SelectStage.model_validate({"kind": "select", "method": "random", "seed": seed, "target": target})
    return choose_keep({}, shape, params)


def _prune(source: Path, out: Path, plan: PrunePlan | None = None) -> PrunePlan:
    out.mkdir()
    plan = plan or _plan(source)
    prune_checkpoint(source, plan, out, SILENT)
    return plan


def test_every_labelled_dimension_is_cut_and_the_others_stay() -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    keep = {"ffn": torch.tensor([0, 3]), "hidden": torch.tensor([1, 2, 5])}
    assert slice_parameter(tensor, Row("w", ("ffn", "hidden"), ""), keep).tolist() == [[1, 2, 5], [19, 20, 23]]
    assert slice_parameter(tensor, Row("w", ("vocab", "hidden"), ""), keep).tolist() == tensor[:, [1, 2, 5]].tolist()
    assert slice_parameter(tensor[0], Row("w", ("head_dim",), ""), keep).tolist() == tensor[0].tolist()


def test_heads_own_neighbouring_rows() -> None:
    assert expand((0, 2), 3) == (0, 1, 2, 6, 7, 8)


def test_axes_that_stay_whole_have_no_entry() -> None:
    shape = read_shape(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4,
            "intermediate_size": 3,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 8,
        }
    )
    plan = PrunePlan(
        "importance", (1,), {"hidden": (0, 1, 2, 3)}, {"ffn": {1: (0, 2)}, "groups": {1: (0, 1)}, "heads": {1: (0, 1)}}
    )
    assert {axis: keep.tolist() for axis, keep in kept_positions(plan, shape, 1).items()} == {"ffn": [0, 2]}
    assert kept_positions(plan, shape, None) == {}


@pytest.mark.parametrize("groups", [4, 2])
def test_a_pruned_layer_holds_the_teachers_numbers_at_the_kept_places(groups: int, tmp_path: Path) -> None:
    source = tiny_model_dir(tmp_path, "qwen2")
    plan = _prune(source, tmp_path / "student", _plan(source, num_query_groups=groups))
    teacher, student = Checkpoint.open(source), Checkpoint.open(tmp_path / "student")
    hidden = list(plan.shared["hidden"])
    for new, old in enumerate(plan.layers):
        rows, kv_rows = (
            [index * 8 + channel for index in plan.by_layer[axis][old] for channel in range(8)]
            for axis in ("heads", "groups")
        )
        assert len(kv_rows) == 8 * groups
        name = "model.layers.{}.self_attn.{}"
        expected = {
            "q_proj.weight": teacher.read(name.format(old, "q_proj.weight"))[rows][:, hidden],
            "q_proj.bias": teacher.read(name.format(old, "q_proj.bias"))[rows],
            "k_proj.weight": teacher.read(name.format(old, "k_proj.weight"))[kv_rows][:, hidden],
            "k_proj.bias": teacher.read(name.format(old, "k_proj.bias"))[kv_rows],
            "v_proj.weight": teacher.read(name.format(old, "v_proj.weight"))[kv_rows][:, hidden],
            "v_proj.bias": teacher.read(name.format(old, "v_proj.bias"))[kv_rows],
            "o_proj.weight": teacher.read(name.format(old, "o_proj.weight"))[hidden][:, rows],
        }
        for part, tensor in expected.items():
            assert torch.equal(student.read(name.format(new, part)), tensor), part
        down = "model.layers.{}.mlp.down_proj.weight"
        ffn = list(plan.by_layer["ffn"][old])
        assert torch.equal(student.read(down.format(new)), teacher.read(down.format(old))[hidden][:, ffn])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(student.read(name), teacher.read(name)[:, hidden])


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_a_pruned_folder_is_a_model_of_exactly_the_planned_size_for_transformers(case: str, tmp_path: Path) -> None:
    source = tiny_model_dir(tmp_path, case)
    plan = _prune(source, tmp_path / "student")
    teacher, student = Checkpoint.open(source), Checkpoint.open(tmp_path / "student")
    target = plan.target_shape(teacher.shape)
    assert student.shape == target
    model = load_transformers(tmp_path / "student")
    assert sum(p.numel() for p in model.parameters()) == num_params(target) < num_params(teacher.shape)
    assert student.config["head_dim"] == teacher.shape.kv_channels
    assert ("lm_head.weight" in student.tensors) is not target.tied_embeddings
    sizes = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"}
    written_by_us = sizes | {"dtype", "torch_dtype", "layer_types", "max_window_layers"}
    for key, value in teacher.config.items():
        assert key in written_by_us or student.config[key] == value, key
    expected = {file.name for file in source.iterdir()}
    assert {file.name for file in (tmp_path / "student").iterdir()} == expected


def test_the_dtype_of_the_weights_is_kept(tmp_path: Path) -> None:
    source = tiny_model_dir(tmp_path, "llama_gqa_tied", dtype=torch.bfloat16)
    _prune(source, tmp_path / "student")
    student = Checkpoint.open(tmp_path / "student")
    assert student.dtypes == {"bfloat16"}
    assert student.config["dtype"] == "bfloat16"


def test_pruning_twice_gives_bit_identical_files(tmp_path: Path) -> None:
    source = tiny_model_dir(tmp_path, "nemotron")
    for name in ("one", "two"):
        _prune(source, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_keeping_everything_gives_the_teachers_tensors(tmp_path: Path) -> None:
    source = tiny_model_dir(tmp_path, "qwen3")
    shape = Checkpoint.open(source).shape
    plan = choose_keep({}, shape, SelectStage.model_validate({"kind": "select", "target": {}}))
    _prune(source, tmp_path / "student", plan)
    teacher, student = Checkpoint.open(source), Checkpoint.open(tmp_path / "student")
    assert all(torch.equal(student.read(p.hf), teacher.read(p.hf)) for p in parameters(shape))


def test_a_missing_slice_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_model_dir(tmp_path, "llama_mha")
    monkeypatch.setattr(slicing, "slice_parameter", lambda tensor, row, keep: tensor)
    with pytest.raises(
        NumericsError, match=r"model.embed_tokens.weight has shape \[512, 64\] after the cut, instead of \[512, 40\]"
    ):
        _prune(source, tmp_path / "student")


def test_an_interrupted_prune_leaves_no_folder_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_model_dir(tmp_path, "llama_mha")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    calls = []

    def interrupted(tensor: Any, row: Row, keep: Any) -> Any:
        calls.append(row)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return slice_parameter(tensor, row, keep)

    monkeypatch.setattr(slicing, "slice_parameter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _prune(source, tmp_path / "student")
    assert not (tmp_path / "student" / "config.json").exists()
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if "student" not in f.parts} == before


def _stage_inputs(source: Path, tmp_path: Path) -> tuple[Inputs, StageContext]:
    folders = {name: tmp_path / name for name in ("plan", "out", "work")}
    for folder in folders.values():
        folder.mkdir()
    write_plan(_plan(source), Checkpoint.open(source).shape, folders["plan"])
    model = Model("teacher", "import", source, "", {"license": "apache-2.0"})
    inputs = Inputs(model, PrunePlanArtifact("select", "select", folders["plan"], "", {}))
    return inputs, StageContext("prune", "toy", folders["out"], folders["work"], Execution(), SILENT)


def test_the_prune_stage_reports_the_student_and_carries_the_licence(tmp_path: Path) -> None:
    source = tiny_model_dir(tmp_path, "mistral")
    inputs, context = _stage_inputs(source, tmp_path)
    result = prune(PruneStage(kind="prune"), inputs, context)
    assert result["license"] == "apache-2.0"
    assert result["num_params"] == num_params(Checkpoint.open(context.out_dir).shape)
    assert (result["architecture"], result["dtype"]) == ("MistralForCausalLM", "float32")
    assert list(context.work_dir.iterdir()) == []
    json.dumps(result)


def test_a_plan_for_another_teacher_is_refused(tmp_path: Path) -> None:
    inputs, context = _stage_inputs(tiny_model_dir(tmp_path, "mistral"), tmp_path)
    other = tiny_model_dir(tmp_path, "llama_mha")
    swapped = replace(inputs, model=Model("teacher", "import", other, "", {}))
    with pytest.raises(ArtifactError, match="was made for"):
        prune(PruneStage(kind="prune"), swapped, context)
    assert list(context.out_dir.iterdir()) == []
