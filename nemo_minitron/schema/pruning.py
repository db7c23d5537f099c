"""Keys of target sizes and of how indices are selected."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import LayerMetric, Precision, Schema, Seed, TaskName, WidthMethod


class Target(Schema):
    """Sizes of the student. null keeps the teacher's size."""

    num_layers: PositiveInt | None = None
    """Layers that stay."""
    hidden_size: PositiveInt | None = None
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt | None = None
    """Neurons of each MLP."""
    num_attention_heads: PositiveInt | None = None
    """Query heads of each layer."""
    num_query_groups: PositiveInt | None = None
    """Key-value heads of each layer. null: as in the teacher, or as many as heads if every head of the teacher has its
    own."""


class SelectionRules(Schema):
    """How the indices that stay are chosen, whatever the sizes."""

    method: Literal["importance", "random", "magnitude"] = "importance"
    """What the choice is based on. random and magnitude (of the weights) are controls for importance."""
    ranking: Literal["per_layer", "network"] = "per_layer"
    """Order of MLP neurons and heads. per_layer: each layer has its own. network: one for all layers, from scores
    summed over the layers."""
    layer_metric: LayerMetric = "block_influence"
    """Metric that decides which layers go."""
    layer_removal: Literal["individual", "contiguous", "iterative"] = "individual"
    """individual: the least important single layers. contiguous: the least important run of neighboring layers
    (2408.11796, section 4). iterative: the layers that were removed first, one after the other."""
    head_merge: Literal["off", "printed", "opposite", "mean"] = "off"
    """What kept heads take over from cut heads (2407.14679, section 2.3). printed: `head + (head - cut)` as printed
    there. opposite: the opposite sign, as in Layer Collapse. mean: the mean. See pruning/merge.py."""
    seed: Seed = 1234
    """Seed of the random numbers that a random selection uses."""


class DepthTask(Schema):
    """A multiple-choice task of lm-eval that measures the importance of layers (Winogrande: 2408.11796, section 4)."""

    name: TaskName
    """Name of the task in lm-eval."""
    source: str | None = None
    """`asset:NAME`, or a folder with offline copies of the task data. null: lm-eval downloads them."""
    limit: PositiveInt | None = 100
    """Use at most this many examples. null: all."""


class Scoring(Schema):
    """How the importance of every axis is measured."""

    num_samples: PositiveInt = 1024
    """Calibration samples (2407.14679, section 2.2)."""
    seq_len_tokens: PositiveInt = 512
    """Tokens in each sequence."""
    width_axes: tuple[Literal["hidden", "ffn", "heads"], ...] = ("hidden", "ffn", "heads")
    """Axes to score. The score of a query group comes from the scores of its heads."""
    method: WidthMethod = "activation"
    """activation: how strongly a channel responds. taylor: activation times the gradient of the loss, which needs a
    backward pass."""
    convention: Literal["modelopt", "paper"] = "modelopt"
    """Which formulas to use where the papers and NVIDIA's code differ; see pruning/importance.py."""
    neuron_score: Literal["before_activation", "after_activation"] | None = None
    """Side of the activation function on which MLP neurons are measured. null: as the convention says."""
    batch_aggregation: Literal["l2", "mean", "var"] = "l2"
    """How scores are combined over the samples."""
    sequence_aggregation: Literal["mean", "l2", "var"] = "mean"
    """How scores are combined over the tokens of a sample."""
    layer_metrics: tuple[LayerMetric, ...] = ("block_influence",)
    """Metrics that measure the importance of layers."""
    block_lengths: tuple[PositiveInt, ...] = ()
    """Lengths of runs of neighboring layers to score as well, for `layer_removal: contiguous`."""
    iterative_drops: Annotated[int, Field(ge=0)] = 0
    """Number of layers to remove one after the other, measuring again after each, for `layer_removal: iterative`."""
    depth_samples: PositiveInt = 16
    """Calibration samples for lm_loss and logit_mse, which need a pass for each layer or run, and for block_influence
    with iterative_drops."""
    depth_task: DepthTask | None = None
    """Task for the layer metric `task`."""
    precision: Precision = "bf16"
    """Floating-point format of weights and activations."""
    seed: Seed = 1234
    """Seed of the random numbers that draw the samples."""

    @property
    def draws_depth_samples(self) -> bool:
        """Whether a metric needs a pass of its own over calibration samples."""
        by_loss = {"lm_loss", "logit_mse"} & set(self.layer_metrics)
        return bool(by_loss) or ("block_influence" in self.layer_metrics and self.iterative_drops > 0)


class Selection(SelectionRules):
    """Target sizes, and how the indices that stay are chosen."""

    target: Target = Target()
    """Sizes of the student."""
    drop_layers: tuple[int, ...] | None = None
    """Layers to drop, counted from 0, instead of a choice by score."""
