"""Score the importance of layers and runs of layers by the effect of their removal.

Names of the scores: `layers.<metric>` [L]; `blocks.<metric>.<length>` [L - length + 1], indexed by the first layer of
the run; `iterative.<metric>` [L], the round in which a layer was removed (rounds + 1 for the remaining layers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.backends.megatron.model.forward import Batch
from nemo_minitron.backends.megatron.model.parts import Model
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.scoring.removal import Effects, effects_of_removal, without_layers
from nemo_minitron.backends.megatron.scoring.stats import activation_scores
from nemo_minitron.families import ModelShape
from nemo_minitron.pruning.choice_task import ChoiceTask
from nemo_minitron.pruning.depth import DepthMetric, Run, lm_loss, logit_mse, runs_of, task_error
from nemo_minitron.schema.base import LayerMetric
from nemo_minitron.schema.pruning import Scoring
from nemo_minitron.system.progress import Progress

TASK = "task"
TASK_BATCH_SIZE = 8
Scores = dict[str, Tensor]


@dataclass(frozen=True)
class DepthSamples:
    """Data for scoring layers."""

    calibration: Sequence[Batch]
    """This data-parallel rank's batches."""
    task: ChoiceTask | None


def depth_scores(
    model: Model,
    shape: ModelShape,
    params: Scoring,
    samples: DepthSamples,
    session: Session,
    progress: Progress,
) -> tuple[Scores, dict[str, float]]:
    """Return (scores, the same metrics of the whole model), fp64, equal on every rank.

    Block influence is computed elsewhere, in the pass that scores the widths.
    """
    probe = _Probe(model, shape, params, samples, session, progress)
    scores: Scores = {}
    whole: dict[str, float] = {}
    for length in dict.fromkeys((1, *params.block_lengths)):
        effects = probe.effects(runs_of(shape.num_layers, length))
        whole |= effects.whole
        for name, values in effects.without.items():
            key = f"layers.{name}" if length == 1 else f"blocks.{name}.{length}"
            scores[key] = torch.tensor(values, dtype=torch.float64)
    if params.iterative_drops:
        for metric in params.layer_metrics:
            scores[f"iterative.{metric}"] = _drop_order(probe, metric)
    return scores, whole


@dataclass(frozen=True)
class _Probe:
    model: Model
    shape: ModelShape
    params: Scoring
    samples: DepthSamples
    session: Session
    progress: Progress

    def effects(self, runs: Sequence[Run], only: LayerMetric | None = None, dropped: Sequence[int] = ()) -> Effects:
        """Measure the removal of each run besides the dropped layers, by every metric that needs a separate pass."""
        whole: dict[str, float] = {}
        without: dict[str, list[float]] = {}
        for batches, metrics in self._metric_batches():
            chosen = {name: make() for name, make in metrics.items() if only in (None, name)}
            if not chosen:
                continue
            found = effects_of_removal(
                self.model, self.shape, batches, runs, chosen, self.session, self.progress, dropped
            )
            whole |= found.whole
            without |= found.without
        return Effects(whole, without)

    def _metric_batches(self) -> list[tuple[Sequence[Batch], dict[str, Callable[[], DepthMetric]]]]:
        """Return batches with the metrics that are measured on them."""
        wanted, task, vocab_size = self.params.layer_metrics, self.samples.task, self.shape.vocab_size
        by_loss = {"lm_loss": lm_loss, "logit_mse": lambda: logit_mse(vocab_size)}
        out: list[tuple[Sequence[Batch], dict[str, Callable[[], DepthMetric]]]] = [
            (self.samples.calibration, {name: make for name, make in by_loss.items() if name in wanted})
        ]
        if task is not None and TASK in wanted:
            error = task_error(len(task.pairs), lambda total: task.accuracy(total.tolist()))
            out.append((task_batches(task, self.session), {TASK: lambda: error}))
        return out

    def importance(self, metric: LayerMetric, left: Sequence[int], dropped: Sequence[int]) -> list[float]:
        """Return the importance of the layers that are left when some are dropped."""
        if metric != "block_influence":
            return self.effects([Run(layer) for layer in left], metric, dropped).without[metric]
        single = self.params.model_copy(
            update={"width_axes": (), "layer_metrics": ("block_influence",), "block_lengths": ()}
        )
        with without_layers(self.model, dropped):
            scores = activation_scores(self.model, self.shape, self.samples.calibration, single, self.session)
        return scores["layers.block_influence"][list(left)].tolist()


def _drop_order(probe: _Probe, metric: LayerMetric) -> Tensor:
    """Return [L]: the round (from 1) in which a layer is removed; each round removes the least important one."""
    rounds = probe.params.iterative_drops
    order = torch.full((probe.shape.num_layers,), rounds + 1, dtype=torch.float64)
    left = list(range(probe.shape.num_layers))
    for number in range(1, rounds + 1):
        dropped = [layer for layer in range(probe.shape.num_layers) if layer not in left]
        importance = probe.importance(metric, left, dropped)
        layer = left[importance.index(min(importance))]
        order[layer] = number
        left.remove(layer)
    return order


def task_batches(task: ChoiceTask, session: Session) -> list[Batch]:
    """Return batches of this data-parallel rank's question-answer pairs, one pair per row, shortest first.

    Rows are padded to the longest of their batch (a multiple of tp); padding after the answer does not affect tokens
    before it. `answer` [B] is the number of the pair.
    """
    order = sorted(range(len(task.pairs)), key=lambda number: sum(map(len, task.pairs[number])))
    mine = order[session.dp_rank :: session.parallel.dp]
    return [
        _task_batch(task, mine[start : start + TASK_BATCH_SIZE], session)
        for start in range(0, len(mine), TASK_BATCH_SIZE)
    ]


def _task_batch(task: ChoiceTask, numbers: Sequence[int], session: Session) -> Batch:
    longest = max(sum(map(len, task.pairs[number])) for number in numbers) - 1
    length = -(-longest // session.parallel.tp) * session.parallel.tp
    tokens, labels = (torch.zeros(len(numbers), length, dtype=torch.long) for _ in range(2))
    mask = torch.zeros(len(numbers), length)
    for row, number in enumerate(numbers):
        question, answer = task.pairs[number]
        ids = torch.tensor([*question, *answer])
        tokens[row, : len(ids) - 1], labels[row, : len(ids) - 1] = ids[:-1], ids[1:]
        mask[row, len(question) - 1 : len(ids) - 1] = 1.0
    batch = {"tokens": tokens, "labels": labels, "loss_mask": mask, "answer": torch.tensor(numbers)}
    return {key: tensor.to(session.device) for key, tensor in batch.items()}
