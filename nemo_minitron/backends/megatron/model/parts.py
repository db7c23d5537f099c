"""Find the layers, norms, embeddings and head of a built Megatron model, and their names in the axis table.

Only this module uses Megatron's names for them, so that a change in Megatron affects one place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor, nn

Model: TypeAlias = LanguageModule
"""This rank's part of a language model, as returned by `build_model`."""
_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Layer:
    """One decoder layer: attention and MLP, each with its norm."""

    index: int
    """0-based index in the whole model."""
    modules: tuple[Any, ...]
    """Megatron's modules of the layer, in execution order."""

    @property
    def input_norm(self) -> nn.Module:
        return self.modules[0].input_layernorm

    @property
    def attention_input(self) -> nn.Module:
        """The fused projection to queries, keys and values."""
        return self.modules[0].self_attention.linear_qkv

    @property
    def attention_output(self) -> nn.Module:
        """The output projection of attention."""
        return self.modules[0].self_attention.linear_proj

    @property
    def pre_mlp_norm(self) -> nn.Module:
        return self.modules[-1].pre_mlp_layernorm

    @property
    def mlp_input(self) -> nn.Module:
        """The MLP's input projection: to the neurons, or to gate and neurons, stacked."""
        return self.modules[-1].mlp.linear_fc1

    @property
    def mlp_output(self) -> nn.Module:
        """The MLP's output projection."""
        return self.modules[-1].mlp.linear_fc2


def _per_layer(model: Model) -> int:
    """Return Megatron's layers per decoder layer: HybridModel has separate attention and MLP layers."""
    return 2 if is_hybrid(model) else 1


def is_hybrid(model: Model) -> bool:
    """Return whether attention and MLP are separate Megatron layers."""
    return hasattr(model, "hybrid_layer_pattern")


def layers(model: Model) -> list[Layer]:
    """Return the layers of this pipeline stage."""
    modules, size = tuple(model.decoder.layers), _per_layer(model)
    starts = range(0, len(modules), size)
    return [Layer(_index(model, start), modules[start : start + size]) for start in starts]


def _index(model: Model, position: int) -> int:
    return (int(model.decoder.layers[position].layer_number) - 1) // _per_layer(model)


def final_norm(model: Model) -> nn.Module:
    """Return the norm before the head; on the last stage only."""
    return model.decoder.final_norm if is_hybrid(model) else model.decoder.final_layernorm


def embedding(model: Model) -> nn.Module | None:
    """Return the embedding module; None on all stages but the first."""
    return getattr(model, "embedding", None)


def head(model: Model) -> Any:
    """Return the output layer; on the last stage only."""
    return model.output_layer


def head_weight(model: Model) -> Tensor:
    """Return this rank's rows of the output layer [V, D], possibly tied to the embeddings; on the last stage only."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


@contextmanager
def only(model: Model, kept: Sequence[Layer]) -> Iterator[None]:
    """Keep only these layers, in this order, inside the context."""
    before = model.decoder.layers
    model.decoder.layers = nn.ModuleList(module for layer in kept for module in layer.modules)
    try:
        yield
    finally:
        model.decoder.layers = before


@contextmanager
def before_layers(model: Model, consume: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `consume(layer index, input)` for every layer in forward passes inside the context."""
    with ExitStack() as stack:
        for layer in layers(model):
            stack.callback(_on_input(layer, partial(consume, layer.index)).remove)
        yield


@contextmanager
def after_layers(model: Model, consume: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `consume(layer index, input, output)` for every layer in forward passes inside the context."""
    with ExitStack() as stack:
        for layer in layers(model):
            given: list[Tensor] = []

            def hook(_: Any, __: Any, out: Any, index: int = layer.index, given: list[Tensor] = given) -> None:
                # A layer returns hidden states and a second value that only models with an encoder use.
                consume(index, given.pop(), out[0])

            stack.callback(_on_input(layer, given.append).remove)
            stack.callback(layer.modules[-1].register_forward_hook(hook).remove)
        yield


@contextmanager
def separate_layers(
    model: Model, input_of: Callable[[int], Tensor], consume: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Separate the layers in forward passes inside the context.

    Layer i gets `input_of(i)` instead of the output of the layer before it. Its output goes to `consume(i, output)`
    and is detached from the graph.
    """
    with ExitStack() as stack:
        for layer in layers(model):

            def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = layer.index) -> Any:
                if "hidden_states" in kwargs:
                    return args, {**kwargs, "hidden_states": input_of(index)}
                return (input_of(index), *args[1:]), kwargs

            def take(_: nn.Module, __: Any, out: Any, index: int = layer.index) -> Any:
                consume(index, out[0])
                return out[0].detach(), *out[1:]

            stack.callback(layer.modules[0].register_forward_pre_hook(replace, with_kwargs=True).remove)
            stack.callback(layer.modules[-1].register_forward_hook(take).remove)
        yield


def train_only_layers(model: Model, trained: Collection[int]) -> bool:
    """Freeze everything but these layers; return whether this stage has one of them."""
    model.requires_grad_(False)
    mine = [layer for layer in layers(model) if layer.index in trained]
    for layer in mine:
        for module in layer.modules:
            module.requires_grad_(True)
    return bool(mine)


@contextmanager
def without_shared_embeddings(model: Model) -> Iterator[None]:
    """Keep Megatron from summing the gradient of tied embeddings over pipeline stages inside the context.

    Frozen embeddings have no gradient, which Megatron-Core 0.10 does not expect.
    """
    shared = model.share_embeddings_and_output_weights
    model.share_embeddings_and_output_weights = False
    try:
        yield
    finally:
        model.share_embeddings_and_output_weights = shared


def _on_input(layer: Layer, consume: Callable[[Tensor], None]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        consume(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    return layer.modules[0].register_forward_pre_hook(hook, with_kwargs=True)


def local_parameters(model: Model) -> dict[str, Tensor]:
    """Return this rank's parameters by their names in the axis table, with the layer index in the whole model.

    With tied embeddings and pipeline stages, the last stage holds a copy of the word embeddings as its output layer. It
    is listed under the embedding's name, so that both copies get the same weights.
    """
    return {_table_name(model, name): tensor for name, tensor in model.named_parameters()}


def _table_name(model: Model, name: str) -> str:
    if name.startswith(_LAYERS):
        number, rest = name.removeprefix(_LAYERS).split(".", 1)
        return f"{_LAYERS}{_index(model, int(number))}.{rest}"
    if name.startswith("decoder.final_norm."):
        return name.replace("final_norm", "final_layernorm")
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return name
