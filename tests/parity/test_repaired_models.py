"""Repair of pruned models: identities, parallel layouts, and its effect."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_minitron.backends.megatron.compensation.sites import SITES
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.magnitude import magnitude_scores
from nemo_minitron.pruning.plan_file import PrunePlan
from nemo_minitron.pruning.selection import choose_keep
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.pruning import Compensation, Selection, Target
from nemo_minitron.stages.common.layer_files import LayerFiles
from nemo_minitron.system.interrupts import STOP_FILE
from tests.support import compensation
from tests.support.compensation import SMALL, Layers
from tests.support.distributed import run_ranks
from tests.support.tiny_models import FAMILY_CASES, load_transformers, tiny_model_dir

WIDTH = Target(hidden_size=48, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2)
MHA_WIDTH = Target(hidden_size=48, ffn_hidden_size=64, num_attention_heads=4)
MODES = {
    "one-shot": SMALL,
    "sequential, stream": SMALL.model_copy(update={"mode": "sequential"}),
    "sequential, layer": SMALL.model_copy(update={"mode": "sequential", "target": "layer"}),
}


@cache
def _cut(root: Path, case: str, target: Target) -> tuple[Path, Path]:
    folder = root / case
    return folder, compensation.cut_model(folder, case, target, dtype=torch.float64)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compensation")


def _repaired(folder: Path, teacher: Path, cases: dict[str, Compensation], num_processes: int = 1) -> dict[str, Layers]:
    layout = Parallel(dp=num_processes, micro_batch_size=2)
    work = folder / f"work-{num_processes}"
    found = run_ranks(num_processes, compensation.repair_layers, folder, teacher, cases, layout, work)
    for other in found[1:]:
        for case in cases:
            assert all(_same(*pair) for pair in zip(other[case], found[0][case], strict=True))
    return found[0]


def _same(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Return whether two repaired layers have the same bits."""
    return all(np.array_equal(one[0][name], other[0][name]) for name in other[0])


def _with(**keys: Any) -> dict[str, Compensation]:
    return {name: params.model_copy(update=keys) for name, params in MODES.items()}


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_every_repair_lowers_the_held_out_error(case: str, root: Path) -> None:
    folder, teacher = _cut(root, case, MHA_WIDTH if case == "llama_mha" else WIDTH)
    for layers in _repaired(folder, teacher, _with(precision="fp64")).values():
        repairs = [repair for _, found in layers for repair in (found or {}).values()]
        has_head = not FAMILY_CASES[case].get("tie_word_embeddings", False)
        assert len(repairs) == 4 * 4 + has_head
        assert all(repair.error <= repair.sliced_error for repair in repairs)
        assert sum(repair.recovered for repair in repairs) / len(repairs) > 0.02, "for this to mean anything"


@pytest.mark.parametrize(("case", "trained"), [("llama_gqa_tied", False), ("qwen2", True)])
def test_a_one_shot_repair_is_ridge_regression_on_the_activations_of_transformers(
    case: str, trained: bool, root: Path, tmp_path: Path
) -> None:
    """A trained student has other weights than the sliced ones, and other biases."""
    folder, teacher = _cut(root, case, WIDTH)
    if trained:
        folder = shutil.copytree(folder, tmp_path / "trained")
        _train(folder / "student")
    params = SMALL.model_copy(update={"precision": "fp64", "dampings": (1e-2,)})
    layers = _repaired(folder, teacher, {"": params})[""]
    tokens = torch.from_numpy(run_ranks(1, compensation.calibration_tokens, folder, params, folder / "work-tokens")[0])
    keep = compensation.models_in(folder, teacher).keep(1)
    whole, cut = (load_transformers(path, torch.float64) for path in (teacher, folder / "student"))
    seen: dict[str, torch.Tensor] = {}
    layer, small = whole.model.layers[1], cut.model.layers[1]
    layer.register_forward_pre_hook(lambda _, args: seen.update(stream=args[0]))
    layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.update(normed=args[0]))
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(neurons=args[0]))
    with torch.no_grad():
        whole(tokens)
        given = small.input_layernorm(seen["stream"][..., keep["hidden"]]).flatten(0, 1)
        queries = layer.self_attn.q_proj(seen["normed"].flatten(0, 1))[:, keep["q"]]
        neurons = seen["neurons"].flatten(0, 1)
        cases = {
            "self_attn.q_proj": (given, queries, small.self_attn.q_proj),
            "mlp.down_proj": (
                neurons[:, keep["ffn"]],
                layer.mlp.down_proj(neurons)[:, keep["hidden"]],
                small.mlp.down_proj,
            ),
        }
        for name, (inputs, wanted, module) in cases.items():
            damped = (1e-2 * inputs.square().sum(0).mean()).sqrt() * torch.eye(inputs.shape[1], dtype=torch.float64)
            lacking = torch.cat([wanted - module(inputs), torch.zeros(len(damped), len(module.weight))])
            expected = torch.linalg.lstsq(torch.cat([inputs, damped]), lacking).solution.T
            found = compensation.updates(layers, folder)[f"model.layers.1.{name}.weight"]
            assert found.any(), "it was repaired"
            # The norms of transformers are computed in fp32.
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def _train(student: Path) -> None:
    """Change the linear layers of a student, as a training would, biases included."""
    model = load_transformers(student, torch.float64)
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.down_proj):
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data += 0.02 * noise
    model.save_pretrained(student)


def test_a_repaired_model_is_not_repaired_again(root: Path, tmp_path: Path) -> None:
    """The second repair measures the model that it gets: there is nothing left to win."""
    folder, teacher = _cut(root, "llama_gqa_tied", WIDTH)
    cases = {"": SMALL.model_copy(update={"precision": "fp64", "dampings": (1e-2,)})}
    first = _repaired(folder, teacher, cases)[""]
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    model = compensation.with_weights(first, load_transformers(folder / "student", torch.float64))
    model.save_pretrained(again / "student")  # type: ignore[operator]
    for (_, before), (_, after) in zip(first, _repaired(again, teacher, cases)[""], strict=True):
        for site, repair in (before or {}).items():
            assert (after or {})[site].sliced_error == pytest.approx(repair.error, rel=1e-6)
            assert repair.error * 0.9 < (after or {})[site].error <= repair.error * (1 + 1e-6)


def test_merged_heads_give_their_rows_and_take_the_output_of_all_heads(tmp_path: Path) -> None:
    teacher = tiny_model_dir(tmp_path / "teacher", "llama_mha", dtype=torch.float64)
    source = Checkpoint.open(teacher).shape
    merging = Selection(method="magnitude", target=MHA_WIDTH, head_merge="mean")
    scores = magnitude_scores(Checkpoint.open(teacher), merging)
    compensation.cut_by(tmp_path, teacher, choose_keep(scores, source, merging))
    models = compensation.models_in(tmp_path, teacher)
    assert models.plan.merged[1]
    keep, read = models.keep(1), models.teacher.read
    given, made = (models.teacher_rows(site, 1) for site in SITES[:2])
    assert torch.equal(made, read("model.layers.1.self_attn.o_proj.weight")[keep["hidden"]])
    queries = read("model.layers.1.self_attn.q_proj.weight")[keep["q"]]
    assert not torch.equal(given[: len(queries)], queries)
    student = models.student.read("model.layers.1.self_attn.q_proj.weight")
    torch.testing.assert_close(given[: len(queries)][:, keep["hidden"]], student)


def test_a_model_that_was_not_cut_keeps_every_bit(tmp_path: Path) -> None:
    teacher = tiny_model_dir(tmp_path / "teacher", "qwen2")
    compensation.cut_by(tmp_path, teacher, _keep_all(teacher))
    for layers in _repaired(tmp_path, teacher, MODES).values():
        assert len(layers) == 4
        assert not any(update.any() for update in compensation.updates(layers, tmp_path).values())


def _keep_all(teacher: Path) -> PrunePlan:
    shape = Checkpoint.open(teacher).shape
    return choose_keep({}, shape, Selection(method="random", target=Target(num_layers=shape.num_layers)))


def test_a_layer_that_ends_at_a_site_gives_the_same_activations_up_to_there(root: Path) -> None:
    teacher = _cut(root, "llama_gqa_tied", WIDTH)[1]
    found = run_ranks(1, compensation.activations_up_to_each_site, teacher)[0]
    whole = found.pop(None)
    first = {"before attention", "attention_input"}
    middle = {*first, "attention_output", "before mlp", "mlp_input"}
    assert {site: set(some) for site, some in found.items()} == {
        "attention_input": first,
        "attention_output": middle,
        "mlp_input": middle,
        "mlp_output": {*middle, "mlp_output", "end"},
    }
    assert set(whole) == set(found["mlp_output"])
    assert all(np.array_equal(array, whole[name]) for some in found.values() for name, array in some.items())


@pytest.mark.parametrize("num_processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_weights_do_not_depend_on_the_number_of_processes(num_processes: int, root: Path) -> None:
    """Damping is fixed, because rounding could decide between two almost equal errors."""
    folder, teacher = _cut(root, "llama_gqa_tied", WIDTH)
    for precision, tolerance in {"fp32": 1e-5, "fp64": 1e-10}.items():
        cases = _with(precision=precision, dampings=(1e-2,))
        one, several = (_repaired(folder, teacher, cases, number) for number in (1, num_processes))
        for mode in cases:
            found, expected = (compensation.updates(layers[mode], folder) for layers in (several, one))
            for name, update in expected.items():
                bound = tolerance * float(update.abs().max() + 1e-3)
                torch.testing.assert_close(found[name], update, rtol=0, atol=bound)


def test_all_processes_use_the_decision_of_the_first_one(root: Path, tmp_path: Path) -> None:
    """Rounding on another device may find no repair where the first process finds one."""
    folder, teacher = _cut(root, "llama_gqa_tied", WIDTH)
    layout = Parallel(dp=2, micro_batch_size=2)
    one, other = run_ranks(2, compensation.repair_with_doubts, folder, teacher, {"": SMALL}, layout, tmp_path)
    assert all(_same(*pair) for pair in zip(other[""], one[""], strict=True))
    assert any(update.any() for update in compensation.updates(one[""], folder).values())


@pytest.mark.parametrize(
    ("target", "one_shot", "sequential"),
    [
        (Target(ffn_hidden_size=64), {"mlp_output"}, {"attention_output", "mlp_output"}),
        (Target(num_attention_heads=4), {"attention_output"}, {"attention_output", "mlp_output"}),
        (Target(num_layers=3), {"mlp_output"}, {site.name for site in SITES}),
    ],
    ids=["neurons", "heads", "layers"],
)
def test_a_sequential_repair_also_changes_weights_whose_inputs_were_not_cut(
    target: Target, one_shot: set[str], sequential: set[str], tmp_path: Path
) -> None:
    """Their inputs have drifted from the teacher's."""
    folder, teacher = _cut(tmp_path, "llama_gqa_tied", target)
    for mode, layers in _repaired(folder, teacher, MODES).items():
        repaired = {site for _, found in layers for site in found or {}}
        assert repaired == (one_shot if mode == "one-shot" else sequential), "the head's inputs were not cut"


def test_duplicated_neurons_are_restored_so_that_the_logits_are_the_teachers(tmp_path: Path) -> None:
    teacher = tiny_model_dir(tmp_path / "teacher", "llama31_rope", dtype=torch.float64)
    model = load_transformers(teacher, torch.float64)
    for layer in model.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight.data[48:] = part.weight.data[:48]
    model.save_pretrained(teacher)
    first_half = {layer: tuple(range(48)) for layer in range(4)}
    whole = _keep_all(teacher)
    plan = PrunePlan("by hand", whole.layers, whole.shared, {**whole.by_layer, "ffn": first_half})
    compensation.cut_by(tmp_path, teacher, plan)
    cases = {"": SMALL.model_copy(update={"precision": "fp64", "dampings": (1e-12,)})}
    tokens = torch.arange(1, 65).reshape(2, 32)
    student = load_transformers(tmp_path / "student", torch.float64)
    with torch.no_grad():
        expected, sliced = model(tokens).logits, student(tokens).logits
        assert (sliced - expected).abs().max() > 0.1
        repaired = compensation.with_weights(_repaired(tmp_path, teacher, cases)[""], student)
        torch.testing.assert_close(repaired(tokens).logits, expected, rtol=0, atol=1e-6)


def test_a_dropped_layer_is_folded_into_the_layer_before_it(tmp_path: Path) -> None:
    """The dropped layer has the neurons of the layer before it, so what it adds is a linear function of those."""
    teacher = tiny_model_dir(tmp_path / "teacher", "llama31_rope", dtype=torch.float64)
    model = load_transformers(teacher, torch.float64)
    before, dropped = model.model.layers[1], model.model.layers[2]
    before.mlp.down_proj.weight.data *= 1e-3
    dropped.self_attn.o_proj.weight.data.zero_()
    for part in ("mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm"):
        dropped.get_submodule(part).weight.data.copy_(before.get_submodule(part).weight.data)
    model.save_pretrained(teacher)
    keep = Selection(target=Target(num_layers=3), drop_layers=(2,), method="random")
    compensation.cut_by(tmp_path, teacher, choose_keep({}, Checkpoint.open(teacher).shape, keep))
    layers = _repaired(tmp_path, teacher, {"": SMALL.model_copy(update={"precision": "fp64"})})[""]
    assert [number for number, (_, found) in enumerate(layers) if found] == [1], "only layer 1 has to take over"
    assert (layers[1][1] or {})["mlp_output"].recovered > 0.95


def test_a_stopped_repair_resumes_to_the_same_bits(root: Path) -> None:
    folder, teacher = _cut(root, "llama_gqa_tied", WIDTH)
    for mode, params in MODES.items():
        whole = _repaired(folder, teacher, {mode: params})[mode]
        done = {number: whole[number][0] for number in range(2)}
        layout, work = Parallel(micro_batch_size=2), folder / "work-resumed"
        again = run_ranks(1, compensation.repair_layers, folder, teacher, {mode: params}, layout, work, done)[0][mode]
        assert [found is None for _, found in again] == [True, True, False, False]
        assert all(_same(*pair) for pair in zip(again, whole, strict=True))


def test_a_llama_student_whose_heads_do_not_fill_its_hidden_size_is_repaired(tmp_path: Path) -> None:
    """Such a student is written as a Mistral model, so only its sizes are compared with the plan."""
    cut = tmp_path / "cut"
    teacher = compensation.cut_model(cut, "llama_gqa_tied", Target(hidden_size=60))
    assert Checkpoint.open(cut / "student").shape.family == "mistral"
    for folder in ("out", "work"):
        (tmp_path / folder).mkdir()
    layout = Parallel(micro_batch_size=2)
    assert run_ranks(1, compensation.repair_stage, cut, teacher, layout, tmp_path) == [""]
    assert Checkpoint.open(tmp_path / "out").shape == Checkpoint.open(cut / "student").shape


def test_a_stop_ends_the_repair_on_all_ranks_after_the_same_layer(root: Path, tmp_path: Path) -> None:
    folder, teacher = _cut(root, "llama_gqa_tied", WIDTH)
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / STOP_FILE).touch()
    layout = Parallel(dp=2, micro_batch_size=2)
    one, other = run_ranks(2, compensation.repair_stage, folder, teacher, layout, tmp_path)
    assert "requested by the file STOP" in one
    assert other == one
    assert len(LayerFiles(tmp_path / "work/repaired_layers")) == 1
