"""Run one decoder layer of a model at a time over stored residual streams, and read its activations.

One layer and its weights are in memory, whatever the depth of the model. Every process has whole layers and a share of
the text, so all layouts of a session are data parallel here (tp = pp = cp = 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_minitron.backends.megatron.model.build import build_layer
from nemo_minitron.backends.megatron.model.forward import evaluating
from nemo_minitron.backends.megatron.model.parts import Layer, Model, layers
from nemo_minitron.backends.megatron.model.weights import load_final_norm, load_layer
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.families import ModelShape, Parameter
from nemo_minitron.families.blocks import ATTENTION, MLP, Block
from nemo_minitron.schema.pruning import LayerSite

Read = Callable[[Parameter], Tensor]
"""Returns the whole Hugging Face tensor of a parameter."""


@dataclass(frozen=True)
class Activations:
    """Activations of one layer for one micro-batch."""

    inputs: dict[str, Tensor]
    """Site (`compensation/sites.py`) -> input of its linear layers [S, B, *]."""
    before: dict[str, Tensor]
    """Block -> residual stream in front of it [S, B, D]."""
    end: Tensor | None
    """Residual stream after the layer [S, B, D]; None if the layer was not run to its end."""

    @property
    def out(self) -> Tensor:
        """The residual stream after a layer that was run to its end."""
        assert self.end is not None
        return self.end

    def after(self, block: str) -> Tensor:
        """Return the residual stream after a block."""
        return self.before[MLP.name] if block == ATTENTION.name else self.out


@dataclass
class LayerRunner:
    """One layer of a model, filled with the weights of any of its layers."""

    shape: ModelShape
    session: Session
    precision: str
    seq_len_tokens: int
    model: Model = field(init=False)

    def __post_init__(self) -> None:
        self.model = build_layer(self.shape, self.session, precision=self.precision, seq_len_tokens=self.seq_len_tokens)

    @property
    def layer(self) -> Layer:
        return layers(self.model)[0]

    def load(self, layer: int, read: Read) -> None:
        """Fill in the weights of a layer."""
        load_layer(self.model, layer, self.shape, read)

    def final_norm(self, streams: Iterable[Tensor], read: Read) -> Iterator[Tensor]:
        """Apply the norm in front of the head to residual streams [S, B, D]; it replaces a norm of the layer."""
        load_final_norm(self.layer.input_norm, self.shape, read)
        for stream in streams:
            yield self.norm(ATTENTION, self._given(stream))

    @torch.no_grad()
    def forward(self, stream_SBD: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        self.model.set_input_tensor(self._given(stream_SBD))
        with evaluating(self.model):
            out: Tensor = self.model(None, None, None)
        return out

    def _given(self, stream_SBD: Tensor) -> Tensor:
        return stream_SBD.to(device=self.session.device, dtype=next(self.model.parameters()).dtype)

    def activations(self, stream_SBD: Tensor, last: LayerSite | None = None) -> Activations:
        """Run the layer and return what enters its linear layers and its blocks.

        Args:
            last: the last site whose input and block are wanted; the layer is run no further than needed for it.
                None: run the whole layer.
        """
        inputs: dict[str, Tensor] = {}
        before: dict[str, Tensor] = {}
        out = None
        with self._reading(inputs, before), self._ending_after(last), suppress(_Reached):
            out = self.forward(stream_SBD)
        return Activations(inputs, before, out)

    @contextmanager
    def _ending_after(self, last: LayerSite | None) -> Iterator[None]:
        """End forward passes behind the norm in front of a site; for attention's output, behind the next norm."""
        norms = {
            "attention_input": self.layer.input_norm,
            "attention_output": self.layer.pre_mlp_norm,
            "mlp_input": self.layer.pre_mlp_norm,
        }
        with ExitStack() as stack:
            if last in norms:
                stack.callback(norms[last].register_forward_hook(_end).remove)
            yield

    @contextmanager
    def _reading(self, inputs: dict[str, Tensor], before: dict[str, Tensor]) -> Iterator[None]:
        layer = self.layer
        with ExitStack() as stack:
            for block, norm in ((ATTENTION.name, layer.input_norm), (MLP.name, layer.pre_mlp_norm)):
                stack.callback(norm.register_forward_pre_hook(_keep_input(before, block)).remove)
                stack.callback(norm.register_forward_hook(_keep_output(inputs, f"{block}_input")).remove)
            for block, module in ((ATTENTION.name, layer.attention_output), (MLP.name, layer.mlp_output)):
                stack.callback(module.register_forward_pre_hook(_keep_input(inputs, f"{block}_output")).remove)
            yield

    @torch.no_grad()
    def norm(self, block: Block, stream_SBD: Tensor) -> Tensor:
        """Apply the norm in front of a block to a residual stream."""
        norm = self.layer.input_norm if block is ATTENTION else self.layer.pre_mlp_norm
        return norm(stream_SBD)


class _Reached(Exception):
    """Ends a forward pass that has computed all that is wanted."""


def _end(_: torch.nn.Module, __: tuple[Tensor, ...], ___: Tensor) -> None:
    raise _Reached


def _keep_input(found: dict[str, Tensor], key: str) -> Callable[..., None]:
    def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        found[key] = args[0].detach()

    return hook


def _keep_output(found: dict[str, Tensor], key: str) -> Callable[..., None]:
    def hook(_: torch.nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
        found[key] = out.detach()

    return hook
