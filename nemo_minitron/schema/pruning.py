"""Keys of target sizes and of how indices are selected."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import LayerMetric, Precision, Schema, Seed, TaskName, WidthMethod


class Target(Schema):
    """Sizes of the student; None keeps the teacher's."""

    num_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    ffn_hidden_size: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    num_query_groups: PositiveInt | None = None
    """None: the teacher's; where every head is its own group, as many as heads."""


class SelectionRules(Schema):
    """How indices are chosen, whatever the sizes."""

    method: Literal["importance", "random", "magnitude"] = "importance"
    """random and magnitude (of the weights) are controls for importance."""
    ranking: Literal["per_layer", "network"] = "per_layer"
    """MLP neurons and heads: one order for each layer, or one for all from scores summed over the layers."""
    layer_metric: LayerMetric = "block_influence"
    layer_removal: Literal["individual", "contiguous", "iterative"] = "individual"
    """The individually least important layers; the least important run of neighbours (2408.11796, section 4); or
    the first that were taken away one after the other."""
    head_merge: Literal["off", "printed", "opposite", "mean"] = "off"
    """What kept heads take in from cut ones (2407.14679, section 2.3): `head + (head - cut)` as printed there, with
    the opposite sign as in Layer Collapse, or the mean; see pruning/merge.py."""
    seed: Seed = 1234


class DepthTask(Schema):
    """A multiple-choice task of lm-eval that layers are judged by (2408.11796, section 4 used Winogrande)."""

    name: TaskName
    source: str | None = None
    """`asset:NAME` or a folder with offline copies of the task data; null: lm-eval's own (needs the hub)."""
    limit: PositiveInt | None = 100
    """Examples; null: all."""


class Scoring(Schema):
    """How the importance of every axis is measured."""

    num_samples: PositiveInt = 1024
    """Calibration samples (2407.14679 section 2.2)."""
    seq_len_tokens: PositiveInt = 512
    width_axes: tuple[Literal["hidden", "ffn", "heads"], ...] = ("hidden", "ffn", "heads")
    """The score of a query group is made of its heads' scores."""
    method: WidthMethod = "activation"
    """activation: how strongly a channel responds. taylor: activation times gradient of the loss, a backward pass."""
    convention: Literal["modelopt", "paper"] = "modelopt"
    """Where the papers' formulas and NVIDIA's code differ; see pruning/importance.py."""
    neuron_score: Literal["before_activation", "after_activation"] | None = None
    """Side of the activation function on which MLP neurons are measured; null: the convention's."""
    batch_aggregation: Literal["l2", "mean", "var"] = "l2"
    sequence_aggregation: Literal["mean", "l2", "var"] = "mean"
    layer_metrics: tuple[LayerMetric, ...] = ("block_influence",)
    block_lengths: tuple[PositiveInt, ...] = ()
    """Lengths of runs of neighbouring layers that are scored too, for `layer_removal: contiguous`."""
    iterative_drops: Annotated[int, Field(ge=0)] = 0
    """Layers to take away one after the other, measuring anew each time, for `layer_removal: iterative`."""
    depth_samples: PositiveInt = 16
    """Calibration samples for lm_loss and logit_mse, which need a pass for each layer or run, and for
    block_influence where layers are taken away one after the other."""
    depth_task: DepthTask | None = None
    """Task of the layer metric `task`."""
    precision: Precision = "bf16"
    seed: Seed = 1234

    @property
    def draws_depth_samples(self) -> bool:
        """Whether a metric needs a pass of its own over calibration samples."""
        by_loss = {"lm_loss", "logit_mse"} & set(self.layer_metrics)
        return bool(by_loss) or ("block_influence" in self.layer_metrics and self.iterative_drops > 0)


class Selection(SelectionRules):
    """Target sizes, and how the indices that stay are chosen."""

    target: Target = Target()
    drop_layers: tuple[int, ...] | None = None
    """Exact 0-based layers to drop, instead of choosing by score."""
