"""Which weights of a pruned model a repair by least squares changes. No torch."""

from __future__ import annotations

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.pruning import Compensation, RepairSite


def repaired_sites(repair: Compensation, source: ModelShape, student: ModelShape) -> list[RepairSite]:
    """Return the sites that a repair changes: those whose inputs were cut, and down_proj in front of dropped layers.

    A sequential repair also changes those whose inputs have only drifted. It leaves q, k, v, gate and up as they are if
    all hidden channels and layers are kept: fitted to drifted inputs, they made SmolLM2 with fewer heads or MLP neurons
    worse (docs/results.md, pruned and repaired without training).
    """
    drifts = repair.mode == "sequential"
    narrower, shallower = student.hidden_size < source.hidden_size, student.num_layers < source.num_layers
    changes: dict[RepairSite, bool] = {
        "attention_input": narrower or (drifts and shallower),
        "attention_output": student.num_attention_heads < source.num_attention_heads or drifts,
        "mlp_input": narrower or (drifts and shallower),
        # down_proj takes over what dropped layers did.
        "mlp_output": student.ffn_hidden_size < source.ffn_hidden_size or shallower or drifts,
        "head": narrower and not student.tied_embeddings,
    }
    return [site for site in repair.sites if changes[site]]
