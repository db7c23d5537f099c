"""What one process of a stage holds and computes, from which its memory follows. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Kernels, Parallel


@dataclass(frozen=True)
class OneLayer:
    """What a process holds that runs a model one layer at a time, in bytes."""

    weights: int
    """One layer of each model."""
    sums: int
    """Sums of products of activations, and the matrices of the largest solution."""
    streams: int
    """Residual streams of its text, in host memory."""
    ranking: int = 0
    """Matrices that the first process ranks by, in host memory."""
    disk: int = 0
    """Output of the stage."""


Kept = Literal["one_layer", "layer_inputs", "activations"]
"""What a forward pass keeps: the tensors of one layer; the inputs of all layers as well; or all that a backward pass
needs."""


@dataclass(frozen=True)
class Work:
    """The computation of a process, as far as it determines its memory.

    Args:
        shape: the model that is trained or evaluated.
        trains: whether there are backward passes; otherwise only forward passes.
        teacher: model in memory beside it; None if there is none.
        teacher_learns: whether the teacher is trained as well.
        hidden_pairs: number of hidden states that are compared with a teacher's.
        anchors: outputs inside each layer that are compared with the teacher's.
        layerwise: whether each layer is trained apart from the others, so that only one has activations in memory, and
            embeddings, final norm and head are not trained.
        teacher_in_fp8: whether Transformer Engine keeps FP8 copies of the teacher's weights.
        lone_forward_kl: whether the loss on logits is forward KL to a whole distribution and nothing else.
        keeps: what a forward pass keeps if the model is not trained.
        logit_bytes: bytes for each logit of a micro-batch, if whole logits are in memory; 0: only chunks of them are.
        one_layer: what it holds instead of a whole model, if it runs one layer at a time; None: it holds a whole model.
        validates: whether the loss on held-out text is measured between training steps.
        then_whole: whether the process afterwards has the whole model in transformers, for a sequence at a time.
        on_gpu: whether the process runs on a GPU, where the chunks of logits are larger.
        kernels: the paths of a training step that its memory depends on.
    """

    shape: ModelShape
    parallel: Parallel
    precision: str
    seq_len_tokens: int
    num_micro_batches: int = 1
    trains: bool = True
    teacher: ModelShape | None = None
    teacher_learns: bool = False
    hidden_pairs: int = 0
    anchors: tuple[str, ...] = ()
    layerwise: bool = False
    teacher_in_fp8: bool = False
    lone_forward_kl: bool = False
    keeps: Kept = "one_layer"
    logit_bytes: int = 0
    one_layer: OneLayer | None = None
    validates: bool = False
    then_whole: bool = False
    on_gpu: bool = False
    kernels: Kernels = field(default_factory=Kernels)
