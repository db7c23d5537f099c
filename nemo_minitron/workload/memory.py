"""Memory of one process of a training, in bytes, by its parts.

The estimates follow from what the code allocates. Weights, gradient buffers and Adam's states are exact. Activations
are the tensors that autograd saves for the backward pass of each module in backends/megatron/model/layers.py (a test
compares them with `saved_tensors_hooks`). The output layer and the loss use the chunks of distillation/linear.py. On a
GPU, Transformer Engine keeps somewhat less than the torch modules that are counted here.

Symbols, all for one rank: w bytes per weight, n tokens of a micro-batch, h hidden size, a heads, g query groups,
q = a * head size, k = g * head size, f FFN size, V vocabulary size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from nemo_minitron.distillation.chunks import block_tokens, chunk_tokens
from nemo_minitron.distillation.rounds import round_size, round_sizes
from nemo_minitron.families import ModelShape
from nemo_minitron.families.blocks import ATTENTION, MLP, Block, Layer
from nemo_minitron.families.registry import layers_of
from nemo_minitron.families.split import padded_vocab_size, params_of_rank, stage_bounds
from nemo_minitron.schema.execution import Kernels, Parallel
from nemo_minitron.workload.heldout import heldout_batch_size
from nemo_minitron.workload.work import OneLayer, Work

GIB = 2**30
WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
FP8_BYTES = 1
"""Bytes of the FP8 copy of a weight. Embeddings and norms have none; they count all the same."""
GRADIENT_BYTES, ADAM_BYTES, MASTER_BYTES = 4, 8, 4
"""Bytes per parameter, all in fp32; master weights exist only beside bf16 weights."""


@dataclass(frozen=True)
class Memory:
    """Memory of one process, in bytes."""

    weights: int = 0
    teacher: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    loss: int = 0
    """Chunks of logits, the gradients of the output layer, and the inputs of the teacher's output layer."""
    hidden_states: int = 0
    """Hidden states of both models, if a loss compares them; on a CPU also streams that wait for their next layer."""
    sums: int = 0
    """Sums of products of activations in fp64, and the matrices that are solved or ranked from them."""

    @property
    def fixed(self) -> int:
        """Memory between two training steps."""
        return self.weights + self.teacher + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())

    def facts(self) -> dict[str, float]:
        """Return all parts and the peak in GiB."""
        parts = {f"{name}_gib": round(value / GIB, 4) for name, value in asdict(self).items()}
        return {**parts, "peak_gib": round(self.peak / GIB, 4)}


def memory_of(work: Work) -> Memory:
    """Return the memory of a process in the pipeline stage that needs the most."""
    found = [_of_stage(work, stage) for stage in range(work.parallel.pp)]
    if work.then_whole:
        found.append(memory_of(replace(work, parallel=Parallel(), then_whole=False)))
    return max(found, key=lambda memory: memory.peak)


def _of_stage(work: Work, stage: int) -> Memory:
    if work.one_layer is not None:
        return _of_one_layer(work, work.one_layer)
    layout, wide = work.parallel, WEIGHT_BYTES[work.precision]
    count = params_of_rank(work.shape, tp=layout.tp, pp=layout.pp, stage=stage)
    learned = _trained_params(work, stage) if work.trains else 0
    teacher = 0
    if work.teacher is not None:
        teacher = params_of_rank(_same_vocab(work.teacher, work), tp=layout.tp, pp=layout.pp, stage=stage)
        learned += teacher if work.teacher_learns else 0
    passes = [_of_pass(work, stage), *_validations(work, stage)]
    return replace(
        max(passes, key=lambda memory: memory.peak),
        weights=wide * count,
        teacher=(wide + (FP8_BYTES if work.teacher_in_fp8 else 0)) * teacher,
        gradients=GRADIENT_BYTES * learned,
        optimizer=optimizer_bytes(learned, work.precision, layout),
    )


def _of_pass(work: Work, stage: int) -> Memory:
    """Return what a training step, or a forward pass, needs besides what exists between two of them."""
    activations, loss = _passes(work, stage)
    return Memory(
        activations=activations,
        loss=loss + (_kept_head_inputs(work) if stage == work.parallel.pp - 1 else 0),
        hidden_states=_stream_bytes(work, stage)
        if work.layerwise
        else _hidden_bytes(work) + _anchor_bytes(work, stage),
    )


def _of_one_layer(work: Work, held: OneLayer) -> Memory:
    """Return the memory of a process with one layer of a model. On a GPU, what is in host memory does not count."""
    return Memory(
        weights=held.weights,
        activations=_forward_only(work),
        hidden_states=0 if work.on_gpu else held.streams,
        sums=held.sums + (0 if work.on_gpu else held.ranking),
    )


def _validations(work: Work, stage: int) -> Iterator[Memory]:
    """Yield the same for the passes of a validation, whose batches do not depend on the micro-batches."""
    if not work.validates:
        return
    layout = work.parallel.model_copy(update={"micro_batch_size": heldout_batch_size(work.seq_len_tokens)})
    # It compares the models at their logits only, by losses that are not fused, in chunks of the default size.
    passes = replace(
        work,
        parallel=layout,
        trains=False,
        hidden_pairs=0,
        anchors=(),
        layerwise=False,
        lone_forward_kl=False,
        kernels=Kernels(),
    )
    yield _of_pass(passes, stage)
    if work.layerwise:
        # The error of a layer's output in fp32, with its square.
        error = 2 * 4 * _tokens(passes) * work.shape.hidden_size
        yield Memory(activations=_forward_only(passes) + error, hidden_states=_stream_bytes(passes, stage))


def _trained_params(work: Work, stage: int) -> int:
    layout = work.parallel
    return params_of_rank(work.shape, tp=layout.tp, pp=layout.pp, stage=stage, layers_only=work.layerwise)


def _passes(work: Work, stage: int) -> tuple[int, int]:
    """Return the bytes of activations and of the loss; those of the teacher's own training if they are larger."""
    last = stage == work.parallel.pp - 1
    if not work.trains:
        return _kept_in_forward(work, stage), _loss_bytes(work) if last else 0
    own = (_activations(work, stage), _loss_bytes(work) if last else 0)
    if work.teacher is None or not work.teacher_learns:
        return own
    # The teacher's backward passes of a round precede the student's forward passes.
    teacher = _same_vocab(work.teacher, work)
    alone = replace(
        work, shape=teacher, teacher=None, teacher_learns=False, hidden_pairs=0, lone_forward_kl=False, anchors=()
    )
    return max(own, _passes(alone, stage), key=sum)


def teacher_micro_batches(work: Work) -> int:
    """Return the largest number of micro-batches whose teacher targets are in memory at the same time."""
    if work.teacher is None or not work.trains:
        return 0
    if work.layerwise:
        return 1
    largest = round_size(work.parallel.pp, teacher_is_live=True, teacher_learns=work.teacher_learns)
    return 1 if largest is None else max(round_sizes(work.num_micro_batches, largest))


def _kept_head_inputs(work: Work) -> int:
    """Return the bytes of the inputs of the teacher's output layer, which the last stage keeps for a round."""
    if work.teacher is None:
        return 0
    each = WEIGHT_BYTES[work.precision] * _tokens(work) * work.teacher.hidden_size
    return max(1, teacher_micro_batches(work)) * each


def optimizer_bytes(num_params: int, precision: str, layout: Parallel) -> int:
    """Return the bytes of Adam's two moments and of the master weights; a distributed optimizer keeps only a share."""
    each = ADAM_BYTES + (MASTER_BYTES if precision == "bf16" else 0)
    return each * num_params // (layout.dp * layout.cp if layout.distributed_optimizer else 1)


def _same_vocab(teacher: ModelShape, work: Work) -> ModelShape:
    """Return the teacher's shape with the larger vocabulary of both models, to which both are padded."""
    return teacher.resized(vocab_size=max(teacher.vocab_size, work.shape.vocab_size))


def _tokens(work: Work) -> int:
    return work.seq_len_tokens * work.parallel.micro_batch_size // work.parallel.cp


def layer_bytes_per_token(shape: ModelShape, parallel: Parallel, precision: str, *, on_gpu: bool = False) -> float:
    """Return the bytes that autograd saves per token in the largest layer."""
    return max(_layer_bytes(layer, shape, parallel, precision, on_gpu=on_gpu) for layer in set(layers_of(shape)))


def _layer_bytes(layer: Layer, shape: ModelShape, parallel: Parallel, precision: str, *, on_gpu: bool) -> float:
    """Return the bytes that autograd saves per token in one layer: those of each block and of the norm before it."""
    w, tp = WEIGHT_BYTES[precision], parallel.tp
    # With sequence parallelism, norms and the residual stream are split as well.
    h = shape.hidden_size / (tp if parallel.sequence_parallel else 1)
    return len(layer) * _norm_bytes(shape, h, w) + sum(BLOCK_BYTES[block](shape, w, tp, on_gpu) for block in layer)


def _attention_bytes(shape: ModelShape, w: int, tp: int, on_gpu: bool) -> float:
    """Return the bytes of the fused QKV projection, rotated q and k, the output, and the softmax statistics."""
    a, g = shape.num_attention_heads / tp, shape.num_query_groups / tp
    q, k = a * shape.kv_channels, g * shape.kv_channels
    attention = w * ((q + 2 * k) + q + k + q) + 4 * a
    if shape.qk_norm:
        attention += (4 + w) * (q + k) + 4 * (a + g)
    return attention


def _mlp_bytes(shape: ModelShape, w: int, tp: int, on_gpu: bool) -> float:
    """Return the bytes of gate, up, activation, its contiguous input, and product; or of the ReLU and its square.

    On a GPU, Megatron fuses the gated activation, which then keeps gate, up and product only.
    """
    tensors = (3 if on_gpu else 5) if shape.gated else 2
    return tensors * w * (shape.ffn_hidden_size / tp)


BlockBytes = Callable[[ModelShape, int, int, bool], float]
"""(shape, bytes of a weight, tp, whether on a GPU) -> bytes that autograd saves per token."""
BLOCK_BYTES: dict[Block, BlockBytes] = {ATTENTION: _attention_bytes, MLP: _mlp_bytes}


def _norm_bytes(shape: ModelShape, h: float, w: int) -> float:
    """Return the bytes of one norm per token: fp32 input, statistics, output, and the normalized input of RMSNorm."""
    return (4 + w) * h + (4 + w * h if shape.norm == "rmsnorm" else 8)


def _activations(work: Work, stage: int) -> int:
    """Return the activations of all layers of a pipeline stage, for all micro-batches that are in flight in it."""
    layout, n, w = work.parallel, _tokens(work), WEIGHT_BYTES[work.precision]
    start, stop = stage_bounds(work.shape.num_layers, layout.pp)[stage]
    each = {
        layer: _layer_bytes(layer, work.shape, layout, work.precision, on_gpu=work.on_gpu) * n
        for layer in set(layers_of(work.shape))
    }
    in_flight = min(layout.pp - stage, work.num_micro_batches)
    h = work.shape.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    stream = w * n * h
    if work.layerwise:
        # The activations of one layer, and the error of its output in fp32 with its square.
        return round(max(each.values()) + stream + 2 * 4 * n * h)
    if layout.recompute == "full":
        # The input of every layer, and the activations of the layer that is being recomputed.
        return round(in_flight * (stop - start) * stream + max(each.values()) + stream)
    own_layers = Counter(layers_of(work.shape)[start:stop])
    final_norm = _norm_bytes(work.shape, h, w) * n if stage == layout.pp - 1 else 0
    return round(sum(in_flight * count * each[layer] for layer, count in own_layers.items()) + final_norm)


def _kept_in_forward(work: Work, stage: int) -> int:
    """Return the bytes that a pass without a training keeps; those of inputs of layers as if all were on one stage."""
    if work.keeps == "activations":
        return _activations(work, stage)
    layout, w = work.parallel, WEIGHT_BYTES[work.precision]
    h = work.shape.hidden_size // (layout.tp if layout.sequence_parallel else 1)
    inputs = (work.shape.num_layers + 1) * w * _tokens(work) * h if work.keeps == "layer_inputs" else 0
    return inputs + _forward_only(work)


def _forward_only(work: Work) -> int:
    """Return the largest set of tensors of one layer: residual stream, its norm, and the MLP's input and output.

    A teacher runs before the other model.
    """
    w, n, tp = WEIGHT_BYTES[work.precision], _tokens(work), work.parallel.tp
    widths = [
        3 * shape.hidden_size + (4 if shape.gated else 2) * shape.ffn_hidden_size / tp
        for shape in (work.shape, work.teacher)
        if shape is not None
    ]
    return round(w * n * max(widths))


def _loss_bytes(work: Work) -> int:
    """Return the bytes of a chunk of both models' logits and the gradients of the output layer's input and weight.

    Or those of whole logits, for work that has them.
    """
    w, n = WEIGHT_BYTES[work.precision], _tokens(work)
    if work.logit_bytes:
        return work.logit_bytes * n * _padded_vocab_of_rank(work)
    total = _chunk_bytes(work)
    if work.trains and not work.layerwise:
        forward, backward = _head_gradient_bytes(work)
        # The chunks are freed before the backward pass.
        total += max(forward, backward - _chunk_bytes(work)) + w * n * work.shape.hidden_size
    return total


def _padded_vocab_of_rank(work: Work) -> int:
    tp = work.parallel.tp
    return padded_vocab_size(max(work.shape.vocab_size, work.teacher.vocab_size if work.teacher else 0), tp) // tp


def _chunk_bytes(work: Work) -> int:
    """Return the bytes of a chunk of each model's logits, and on a GPU of the fp32 blocks that the loss works on.

    On a CPU a block is a part of the cache. The fused forward KL has none.
    """
    w, n, vocab = WEIGHT_BYTES[work.precision], _tokens(work), _padded_vocab_of_rank(work)
    chunk = min(n, work.kernels.chunk_tokens or chunk_tokens(vocab, on_gpu=work.on_gpu))
    models = 1 if work.teacher is None else 2
    fused = work.lone_forward_kl and work.kernels.fused_kl != "off"
    block = block_tokens(vocab, chunk, on_gpu=True) if work.on_gpu and not fused else 0
    # Logits of each model in fp32 unless they already are, and one more for exponentials.
    blocks = 1 + (models if work.precision == "bf16" else 0)
    return w * models * chunk * vocab + 4 * blocks * block * vocab


def _head_gradient_bytes(work: Work) -> tuple[int, int]:
    """Return the bytes that the gradient of the output layer's weight takes in the forward and the backward pass.

    If it is added to the gradient buffer directly, autograd still gets a placeholder in the backward pass. Otherwise it
    is summed in fp32 and, for bf16 weights, converted. A CPU computes the product of a chunk in bf16 first.
    """
    size, w = _padded_vocab_of_rank(work) * work.shape.hidden_size, WEIGHT_BYTES[work.precision]
    product = w * size if work.precision == "bf16" and not work.on_gpu else 0
    if work.kernels.head_gradient_in_place:
        return product, w * size
    return 4 * size + product, (4 + (w if work.precision == "bf16" else 0)) * size


def _stream_bytes(work: Work, stage: int) -> int:
    """Return the bytes of the teacher's streams before and after each layer of a pipeline stage."""
    layout, n, w = work.parallel, _tokens(work), WEIGHT_BYTES[work.precision]
    start, stop = stage_bounds(work.shape.num_layers, layout.pp)[stage]
    h = work.shape.hidden_size // (layout.tp if layout.sequence_parallel else 1)
    return (stop - start + 1) * w * n * h


def _anchor_bytes(work: Work, stage: int) -> int:
    """Return the bytes of the teacher's outputs inside the layers of a stage and of the errors in fp32.

    With pipeline stages the teacher's outputs exist for a round of micro-batches, the errors for those in flight.
    """
    layout, n, w = work.parallel, _tokens(work), WEIGHT_BYTES[work.precision]
    start, stop = stage_bounds(work.shape.num_layers, layout.pp)[stage]
    h = work.shape.hidden_size // (layout.tp if layout.sequence_parallel else 1)
    neurons = (2 if work.shape.gated else 1) * work.shape.ffn_hidden_size // layout.tp
    width = sum(neurons if name == "gate_up" else h for name in work.anchors)
    held = max(1, teacher_micro_batches(work))
    in_flight = min(layout.pp - stage, work.num_micro_batches)
    return (stop - start) * n * width * (w * held + 4 * in_flight)


def _hidden_bytes(work: Work) -> int:
    """Return the bytes of both models' hidden states and of the student's states projected to the teacher's size.

    A stage keeps its part of the teacher's states of a whole round; those of one micro-batch count for all stages.
    """
    if not work.hidden_pairs or work.teacher is None:
        return 0
    w, n = WEIGHT_BYTES[work.precision], _tokens(work)
    one = work.hidden_pairs * n * w * (work.shape.hidden_size + 2 * work.teacher.hidden_size)
    on_stage = -(-work.hidden_pairs // work.parallel.pp)
    return one + max(0, teacher_micro_batches(work) - 1) * on_stage * n * w * work.teacher.hidden_size
