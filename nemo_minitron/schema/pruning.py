"""Keys of target sizes and of how indices are selected."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import FITTING_SEED, LayerMetric, Off, Precision, Schema, Seed, TaskName, WidthMethod

LayerSite = Literal["attention_input", "attention_output", "mlp_input", "mlp_output"]
"""Linear layers of a decoder layer that share one input."""
RepairSite = LayerSite | Literal["head"]
"""Linear layers of a model that a repair can change."""

Damping = Annotated[float, Field(gt=0.0)]


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
    """How the indices to keep are chosen, for given sizes."""

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
    head_merge: Annotated[Literal["off", "printed", "opposite", "mean"], Off] = "off"
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
    backward pass. wanda: root mean square of the activation, times the norm of the weights that read it (2306.11695);
    `convention`, `neuron_score` and the aggregations do not apply to it."""
    convention: Literal["modelopt", "paper"] = "modelopt"
    """Which formulas to use where the papers and NVIDIA's code differ; see pruning/importance.py."""
    neuron_score: Literal["before_activation", "after_activation"] | None = None
    """Side of the activation function on which MLP neurons are measured. null: as in `convention`."""
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


class Compensation(Schema):
    """How a pruned model is repaired in closed form."""

    mode: Literal["one_shot", "sequential"] = "one_shot"
    """one_shot: every weight is repaired for the teacher's own activations. sequential: layer by layer, for the
    activations of the repaired layers before it."""
    target: Literal["layer", "stream"] = "stream"
    """What a sequential repair approximates. layer: the output of the same linear layer of the teacher. stream: the
    teacher's residual stream, which also makes up for errors of earlier layers."""
    sites: tuple[RepairSite, ...] = ("attention_input", "attention_output", "mlp_input", "mlp_output", "head")
    """Linear layers to repair: those that read the residual stream (q, k and v; gate and up; the output head, unless it
    is tied to the embeddings) and those that write to it (o_proj; down_proj). one_shot: if their inputs were cut, and
    down_proj in front of dropped layers. sequential: also o_proj and down_proj of all layers, because their inputs have
    drifted; and q, k, v, gate and up of all layers if layers were dropped."""
    num_samples: PositiveInt = 256
    """Samples of calibration text."""
    heldout_tokens: PositiveInt = 16384
    """Tokens of held-out text, on which damping is chosen and every repair is judged; fewer if there are fewer."""
    seq_len_tokens: PositiveInt = 512
    """Tokens in each sequence."""
    dampings: Annotated[tuple[Damping, ...], Field(min_length=1)] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Values to choose the damping of the least squares from, as shares of the mean squared input."""
    precision: Precision = "fp32"
    """Floating-point format of weights and activations; sums are fp64."""
    seed: Seed = FITTING_SEED
    """Seed of the random numbers that draw the samples. It differs from that of a training."""


class ReconstructionScoring(Schema):
    """How indices are ranked by what the layers lose when least squares repairs them after the cut."""

    method: Literal["obs", "greedy"] = "obs"
    """obs: remove what costs the least (Optimal Brain Surgeon, as in ZipLM and OSSCAR). greedy: add what helps most."""
    width_axes: tuple[Literal["hidden", "ffn", "heads"], ...] = ("hidden", "ffn", "heads")
    """Axes to rank."""
    step: PositiveInt = 16
    """Neurons or hidden channels that are chosen at once; heads are chosen one by one."""
    swap_to: Target = Target()
    """Sizes for which kept and cut indices are exchanged afterwards while that lowers the error (OSSCAR, 2403.12983).
    The ranking is then best for these sizes. null sizes: no exchange. Heads are exchanged inside their query group;
    the number of layers is not used."""
    swap_rounds: PositiveInt = 20
    """Maximum number of exchanges on each axis of a layer (hidden channels: in all)."""
    num_samples: PositiveInt = 256
    """Samples of calibration text."""
    seq_len_tokens: PositiveInt = 512
    """Tokens in each sequence."""
    precision: Precision = "fp32"
    """Floating-point format of weights and activations; sums are fp64."""
    seed: Seed = FITTING_SEED
    """Seed of the random numbers that draw the samples. It differs from that of a training."""

    @property
    def layer_metrics(self) -> tuple[LayerMetric, ...]:
        """Metrics of layers: none."""
        return ()

    @property
    def block_lengths(self) -> tuple[int, ...]:
        """Lengths of runs of layers that have scores: none."""
        return ()

    @property
    def iterative_drops(self) -> int:
        """Number of layers that have been removed one after the other: none."""
        return 0


AnyScoring = Scoring | ReconstructionScoring
"""Keys of every kind of stage that publishes scores."""
