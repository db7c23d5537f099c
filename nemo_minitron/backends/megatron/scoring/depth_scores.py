"""Importance of layers and of runs of layers, by what their removal does.

Names of the scores: `layers.<metric>` [L]; `blocks.<metric>.<length>` [L - length + 1], of runs by their first
layer; `iterative.<metric>` [L], the round in which a layer was taken away (those left: the rounds + 1).
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
    """What layers are judged on."""

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
    """(scores, the same figures of the whole model), fp64, equal on every rank.

    Block influence of layers and runs is not here: it comes from the pass that scores the widths.
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

    def effects(self, runs: Sequence[Run], only: LayerMetric | None = None) -> Effects:
        """Of the removal of each run, by every metric that needs a pass of its own."""
        whole: dict[str, float] = {}
        without: dict[str, list[float]] = {}
        for batches, metrics in self._questions():
            chosen = {name: make() for name, make in metrics.items() if only in (None, name)}
            if not chosen:
                continue
            found = effects_of_removal(self.model, self.shape, batches, runs, chosen, self.session, self.progress)
            whole |= found.whole
            without |= found.without
        return Effects(whole, without)

    def _questions(self) -> list[tuple[Sequence[Batch], dict[str, Callable[[], DepthMetric]]]]:
        """Batches, and the metrics that are measured on them."""
        wanted, task, vocab_size = self.params.layer_metrics, self.samples.task, self.shape.vocab_size
        by_loss = {"lm_loss": lm_loss, "logit_mse": lambda: logit_mse(vocab_size)}
        out: list[tuple[Sequence[Batch], dict[str, Callable[[], DepthMetric]]]] = [
            (self.samples.calibration, {name: make for name, make in by_loss.items() if name in wanted})
        ]
        if task is not None and TASK in wanted:
            error = task_error(len(task.pairs), lambda total: task.accuracy(total.tolist()))
            out.append((task_batches(task, self.session), {TASK: lambda: error}))
        return out

    def importance(self, metric: LayerMetric, left: Sequence[int]) -> list[float]:
        """Of the layers that are left."""
        if metric != "block_influence":
            return self.effects([Run(layer) for layer in left], metric).without[metric]
        single = self.params.model_copy(
            update={"width_axes": (), "layer_metrics": ("block_influence",), "block_lengths": ()}
        )
        scores = activation_scores(self.model, self.shape, self.samples.calibration, single, self.session)
        return scores["layers.block_influence"][list(left)].tolist()


def _drop_order(probe: _Probe, metric: LayerMetric) -> Tensor:
    """[L]: round (from 1) in which a layer goes, each time the one that is missed least."""
    rounds = probe.params.iterative_drops
    order = torch.full((probe.shape.num_layers,), rounds + 1, dtype=torch.float64)
    left = list(range(probe.shape.num_layers))
    for number in range(1, rounds + 1):
        dropped = [layer for layer in range(probe.shape.num_layers) if layer not in left]
        with without_layers(probe.model, dropped):
            importance = probe.importance(metric, left)
        layer = left[importance.index(min(importance))]
        order[layer] = number
        left.remove(layer)
    return order


def task_batches(task: ChoiceTask, session: Session) -> list[Batch]:
    """This data-parallel rank's questions with their answers, one of each a row, shortest first.

    Rows are filled up to the longest of their batch (a multiple of tp): what follows an answer changes nothing
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
