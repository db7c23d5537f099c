"""Pruning against transformers' own arithmetic, in fp64, for every family, MHA and GQA, tied and untied.

The checkpoints go through the real path: files in, `prune_checkpoint`, files out. The tolerance is that of
fp64 sums in another order; logits are of order one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_minitron.families import ModelShape, parameters
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.plan_file import PrunePlan
from nemo_minitron.pruning.positions import Keep, expand
from nemo_minitron.pruning.selection import choose_keep
from nemo_minitron.pruning.slicing import prune_checkpoint, slice_parameter
from nemo_minitron.stages.select.params import SelectStage
from nemo_minitron.system.progress import Progress
from tests.support.tiny_models import load_transformers, tiny_model_dir

ATOL = 1e-11
FAMILIES = ("llama31_rope", "mistral", "qwen2", "qwen3", "nemotron")
GROUPS = {"mha": 8, "gqa": 2}
VARIANTS = list(itertools.product(FAMILIES, GROUPS, (True, False)))
IDS = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}-{'tied' if v[2] else 'untied'}")
def teacher_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    case, attention, tied = request.param
    sizes = {"num_key_value_heads": GROUPS[attention], "tie_word_embeddings": tied, "num_hidden_layers": 3}
    return tiny_model_dir(tmp_path, case, dtype=torch.float64, **sizes)


class _ExactRMSNorm(nn.Module):
    """transformers' RMSNorm without its conversion to fp32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.detach().double()), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _load(folder: Path) -> Any:
    """Load the model in transformers, with all arithmetic in fp64."""
    model = load_transformers(folder, torch.float64)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, _ExactRMSNorm(child.weight, child.variance_epsilon))
    return model


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(IDS, use_cache=False).logits
    return logits


def _norms(model: Any) -> list[nn.Module]:
    """Yield the norms over hidden channels (not those of queries and keys)."""
    layers = model.model.layers
    return [*(n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)), model.model.norm]


def _plan(folder: Path, **target: int) -> PrunePlan:
    """Choose random indices: what holds for them holds for the important ones."""
    params = SelectStage.model_validate({"kind": "select", "method": "random", "seed": 7, "target": target})
    return choose_keep({}, Checkpoint.open(folder).shape, params)


def _student(teacher_dir: Path, plan: PrunePlan) -> Any:
    out = teacher_dir.parent / "student"
    out.mkdir()
    prune_checkpoint(teacher_dir, plan, out, Progress(silent=True))
    return _load(out)


def _dropped(keep: tuple[int, ...], size: int) -> list[int]:
    return sorted(set(range(size)) - set(keep))


# --- sorting ------------------------------------------------------------------------------------


def _orders(shape: ModelShape) -> Callable[[int | None], Keep]:
    """Return a random order of channels, of each layer's neurons, of groups, and of the heads in each group."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randperm(shape.hidden_size, generator=generator)
    layers: dict[int, Keep] = {}
    for layer in range(shape.num_layers):
        groups = torch.randperm(shape.num_query_groups, generator=generator).tolist()
        size = shape.heads_per_group
        heads = [group * size + head for group in groups for head in torch.randperm(size, generator=generator).tolist()]
        layers[layer] = {
            "hidden": hidden,
            "ffn": torch.randperm(shape.ffn_hidden_size, generator=generator),
            "q": torch.tensor(expand(tuple(heads), shape.kv_channels)),
            "kv": torch.tensor(expand(tuple(groups), shape.kv_channels)),
        }
    return lambda layer: {"hidden": hidden} if layer is None else layers[layer]


def test_sorting_every_axis_leaves_the_model_unchanged(teacher_dir: Path) -> None:
    checkpoint = Checkpoint.open(teacher_dir)
    order = _orders(checkpoint.shape)
    model = _load(teacher_dir)
    before = _logits(model)
    state = {
        parameter.hf: slice_parameter(checkpoint.read(parameter.hf), parameter.row, order(parameter.layer))
        for parameter in parameters(checkpoint.shape)
    }
    moved = sum(not torch.equal(tensor, checkpoint.read(name)) for name, tensor in state.items())
    assert moved >= len(state) - 2 * checkpoint.shape.num_layers, "only the norms of queries and keys have no order"
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    torch.testing.assert_close(_logits(model), before, rtol=0, atol=ATOL)


# --- masked == sliced ---------------------------------------------------------------------------


@torch.no_grad()
def test_cutting_neurons_equals_silencing_them(teacher_dir: Path) -> None:
    plan = _plan(teacher_dir, ffn_hidden_size=40)
    masked = _load(teacher_dir)
    whole = _logits(masked)
    for index, layer in enumerate(masked.model.layers):
        layer.mlp.down_proj.weight[:, _dropped(plan.by_layer["ffn"][index], layer.mlp.down_proj.in_features)] = 0.0
    expected = _logits(masked)
    assert (expected - whole).abs().max() > 1e-2, "silencing must show"
    torch.testing.assert_close(_logits(_student(teacher_dir, plan)), expected, rtol=0, atol=ATOL)


CUTS: dict[str, tuple[int, int, dict[str, int]]] = {
    "heads": (2, 2, {"num_attention_heads": 4}),
    "heads with keys of their own": (8, 4, {"num_attention_heads": 4}),
    "groups": (4, 2, {"num_query_groups": 2}),
    "groups and heads": (4, 2, {"num_query_groups": 2, "num_attention_heads": 2}),
}
"""Query groups of a teacher with 8 heads, those that are left, and the target."""


@torch.no_grad()
@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cut", CUTS)
def test_cutting_heads_equals_silencing_them(case: str, tied: bool, cut: str, tmp_path: Path) -> None:
    groups, groups_left, target = CUTS[cut]
    sizes = {"num_key_value_heads": groups, "tie_word_embeddings": tied, "num_hidden_layers": 3}
    teacher_dir = tiny_model_dir(tmp_path, case, dtype=torch.float64, **sizes)
    shape = Checkpoint.open(teacher_dir).shape
    plan = _plan(teacher_dir, **target)
    assert {len(kept) for kept in plan.by_layer["groups"].values()} == {groups_left}
    masked = _load(teacher_dir)
    whole = _logits(masked)
    for index, layer in enumerate(masked.model.layers):
        dropped = _dropped(expand(plan.by_layer["heads"][index], shape.kv_channels), shape.axis_sizes()["q"])
        layer.self_attn.o_proj.weight[:, dropped] = 0.0
    expected = _logits(masked)
    assert (expected - whole).abs().max() > 1e-2, "silencing must show"
    torch.testing.assert_close(_logits(_student(teacher_dir, plan)), expected, rtol=0, atol=ATOL)


@torch.no_grad()
def _silence_channels(model: Any, keep: list[int], drop: list[int], *, fill_with_mean: bool) -> None:
    """Let nothing depend on the dropped channels of the residual stream.

    They hold zero, or (`fill_with_mean`) the mean of the kept ones; the norms return zero for them.
    """
    residual = [model.model.embed_tokens.weight.T]
    for layer in model.model.layers:
        residual += [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
    for written in residual:
        written[drop] = written[keep].mean(0) if fill_with_mean else 0.0
    for norm in _norms(model):
        if fill_with_mean:
            norm.weight[drop] = -1.0  # the layer multiplies by 1 + weight
            norm.bias[drop] = 0.0
        else:
            norm.weight[drop] = 0.0


@torch.no_grad()
def _rescale_norms(model: Any, factor: float, *, one_plus_weight: bool) -> None:
    """Multiply the normalized values by sqrt(factor), and shrink eps by factor."""
    for norm in _norms(model):
        if one_plus_weight:
            norm.weight.copy_((1.0 + norm.weight) * factor**0.5 - 1.0)
        else:
            norm.weight.mul_(factor**0.5)
        norm.eps *= factor  # type: ignore[operator]


def test_cutting_channels_equals_silencing_them_up_to_the_norms_factor(teacher_dir: Path) -> None:
    """With d of D channels left, mean squares are taken over d instead of D.

    RMSNorm: x / sqrt(sum x^2 / D + eps') * sqrt(d / D) = x / sqrt(sum x^2 / d + eps) with eps' = eps d / D.
    So a sliced model is the silenced one with its norms' weights times sqrt(d / D).

    LayerNorm also subtracts the mean. Silenced channels that hold zero shift it, and nothing simple holds;
    silenced channels that hold the mean of the kept ones do not change the mean and add nothing to the variance,
    and then the same factor holds (biases stay as they are).
    """
    shape = Checkpoint.open(teacher_dir).shape
    plan = _plan(teacher_dir, hidden_size=40)
    factor = 40 / shape.hidden_size
    layer_norm = shape.norm == "layernorm1p"
    masked = _load(teacher_dir)
    keep, drop = list(plan.shared["hidden"]), _dropped(plan.shared["hidden"], shape.hidden_size)
    _silence_channels(masked, keep, drop, fill_with_mean=layer_norm)
    without_factor = _logits(masked)
    _rescale_norms(masked, factor, one_plus_weight=layer_norm)
    expected, sliced = _logits(masked), _logits(_student(teacher_dir, plan))
    torch.testing.assert_close(sliced, expected, rtol=0, atol=ATOL)
    assert (sliced - without_factor).abs().max() > 1e-2, "the factor must matter"


def test_zeroed_channels_shift_the_mean_of_a_layer_norm_so_that_no_factor_helps(tmp_path: Path) -> None:
    teacher_dir = tiny_model_dir(tmp_path, "nemotron", dtype=torch.float64)
    plan = _plan(teacher_dir, hidden_size=40)
    masked = _load(teacher_dir)
    keep, drop = list(plan.shared["hidden"]), _dropped(plan.shared["hidden"], 64)
    with torch.no_grad():
        _silence_channels(masked, keep, drop, fill_with_mean=True)
        for written in (masked.model.embed_tokens.weight.T, *_residual_writers(masked)):
            written[drop] = 0.0
    _rescale_norms(masked, 40 / 64, one_plus_weight=True)
    assert (_logits(_student(teacher_dir, plan)) - _logits(masked)).abs().max() > 1e-2


def _residual_writers(model: Any) -> list[Tensor]:
    return [w for layer in model.model.layers for w in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)]


# --- depth --------------------------------------------------------------------------------------


def test_cutting_layers_equals_a_model_without_them(teacher_dir: Path) -> None:
    plan = _plan(teacher_dir, num_layers=2)
    shortened = _load(teacher_dir)
    whole = _logits(shortened)
    shortened.model.layers = nn.ModuleList(shortened.model.layers[index] for index in plan.layers)
    shortened.config.num_hidden_layers = len(plan.layers)
    expected = _logits(shortened)
    assert (expected - whole).abs().max() > 1e-2, "removal must show"
    assert torch.equal(_logits(_student(teacher_dir, plan)), expected)


def test_cutting_everything_at_once_equals_cutting_one_axis_after_the_other(teacher_dir: Path) -> None:
    """Files of one prune with four axes, and of four prunes in a row, are the same numbers."""
    shape = Checkpoint.open(teacher_dir).shape
    plan = _plan(teacher_dir, num_layers=2, hidden_size=40, ffn_hidden_size=40)
    layers = tuple(range(shape.num_layers))
    everything = {
        axis: dict.fromkeys(layers, tuple(range(size)))
        for axis, size in (("groups", shape.num_query_groups), ("heads", shape.num_attention_heads))
    }
    narrow = dict.fromkeys(layers, tuple(range(40)))
    first_ffn = {layer: plan.by_layer["ffn"].get(layer, tuple(range(40))) for layer in layers}
    steps = [
        PrunePlan("by hand", layers, {"hidden": tuple(range(shape.hidden_size))}, {"ffn": first_ffn, **everything}),
        PrunePlan("by hand", layers, plan.shared, {"ffn": narrow, **everything}),
        PrunePlan("by hand", plan.layers, {"hidden": tuple(range(40))}, {"ffn": narrow, **everything}),
    ]
    folder = teacher_dir
    for number, step in enumerate(steps):
        out = teacher_dir.parent / f"step{number}"
        out.mkdir()
        prune_checkpoint(folder, step, out, Progress(silent=True))
        folder = out
    _student(teacher_dir, plan)
    at_once, in_steps = Checkpoint.open(teacher_dir.parent / "student"), Checkpoint.open(folder)
    assert all(torch.equal(at_once.read(p.hf), in_steps.read(p.hf)) for p in parameters(at_once.shape))
