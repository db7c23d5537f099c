"""Load of scoring importance: a pass over the calibration samples, and passes without layers. No torch.

Every pass here has the whole logits of a micro-batch in memory. What is in memory follows from
backends/megatron/scoring and from `token_nll`, which computes the next-token loss in fp32.
"""

from __future__ import annotations

from dataclasses import replace

from nemo_minitron.distillation.flops import (
    forward_flops_per_token,
    frozen_backward_flops_per_token,
    head_flops_per_token,
)
from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.pruning import Scoring
from nemo_minitron.workload.load import Load, forward_load
from nemo_minitron.workload.memory import WEIGHT_BYTES
from nemo_minitron.workload.work import Kept

FP32 = 4
LOSS_TENSORS = 3
"""Tensors of the size of the logits, in fp32, that a next-token loss computes with."""
BACKWARD_TENSORS = 4
"""The same in its backward pass: the exponentials, the gradients of both paths to the logits, and their sum."""


def scoring_load(shape: ModelShape, keys: Scoring, layout: Parallel) -> Load:
    """Return the load of the pass that scores width and block influence; those of the other metrics of depth follow.

    Questions of a task are not counted.
    """
    width = _width_load(shape, keys, layout)
    layers, heads = depth_passes(keys, shape.num_layers)
    if not heads:
        return width
    head = head_flops_per_token(shape)
    one_layer = (forward_flops_per_token(shape, keys.seq_len_tokens) - head) / shape.num_layers
    each = layers * one_layer + heads * head
    # Two sets of logits: those of the whole model and those without a run, or Megatron's two orders of the same.
    logit_bytes = 2 * WEIGHT_BYTES[keys.precision] + (LOSS_TENSORS * FP32 if _by_loss(keys) else 0)
    # Removals keep the stream before each layer, so that only the layers behind a run are computed again.
    kept: Kept = "layer_inputs" if _by_loss(keys) else "one_layer"
    work = replace(width.work, keeps=kept, logit_bytes=logit_bytes)
    return replace(width, others=(Load(work, keys.depth_samples * keys.seq_len_tokens, each),))


def depth_passes(keys: Scoring, num_layers: int) -> tuple[int, int]:
    """Return how often a token of the depth samples passes a layer, and the output layer.

    Removing a run computes the layers behind it again. Runs of one length begin at every layer where they fit.
    """
    layers = heads = 0
    if _by_loss(keys):
        for length in {1, *keys.block_lengths}:
            behind_first = max(0, num_layers - length)
            layers += num_layers + _sum_up_to(behind_first)
            heads += 2 + behind_first
    for dropped in range(min(keys.iterative_drops, num_layers - 1)):
        left = num_layers - dropped
        # The whole model, with which logits are compared; the model without the dropped layers; each removal.
        whole = 1 if dropped else 0
        layers += _by_loss(keys) * (whole * num_layers + left + _sum_up_to(left - 1))
        heads += _by_loss(keys) * (whole + 1 + left)
        if "block_influence" in keys.layer_metrics:
            layers, heads = layers + left, heads + 1
    return layers, heads


def _width_load(shape: ModelShape, keys: Scoring, layout: Parallel) -> Load:
    # A model that is evaluated keeps its activations, whatever the layout recomputes.
    kept = layout.model_copy(update={"recompute": "none"})
    tokens = keys.num_samples * keys.seq_len_tokens
    found = forward_load(shape, tokens, keys.seq_len_tokens, keys.precision, kept)
    wide = WEIGHT_BYTES[keys.precision]
    if keys.method == "taylor":
        work = replace(found.work, keeps="activations", logit_bytes=wide + BACKWARD_TENSORS * FP32)
        backward = frozen_backward_flops_per_token(shape, keys.seq_len_tokens)
        return replace(found, work=work, flops_per_token=found.flops_per_token + backward)
    in_runs = "block_influence" in keys.layer_metrics and any(length > 1 for length in keys.block_lengths)
    # Megatron copies the logits to put the batch first.
    work = replace(found.work, keeps="layer_inputs" if in_runs else "one_layer", logit_bytes=2 * wide)
    return replace(found, work=work)


def _by_loss(keys: Scoring) -> int:
    """Return the number of metrics that compare logits or the loss."""
    return len({"lm_loss", "logit_mse"} & set(keys.layer_metrics))


def _sum_up_to(number: int) -> int:
    return number * (number + 1) // 2
