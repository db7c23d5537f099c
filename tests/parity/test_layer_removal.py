"""Removing layers from cached activations equals cutting them out of the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.backends.megatron.data.datasets import HeldOutBatches, step_batches, training_samples
from nemo_minitron.backends.megatron.model.evaluate import sum_nll
from nemo_minitron.backends.megatron.model.forward import Batch
from nemo_minitron.backends.megatron.model.parts import layers
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.session import Session, open_session
from nemo_minitron.backends.megatron.scoring.depth_scores import DepthSamples, depth_scores
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.selection import choose_keep
from nemo_minitron.pruning.slicing import prune_checkpoint
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.score.params import ScoreStage
from nemo_minitron.stages.select.params import SelectStage
from nemo_minitron.system.progress import Progress
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import load_transformers, tiny_model_dir

LAYERS, DROPS = 6, 4
SILENT = Progress(silent=True)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session(Parallel(micro_batch_size=4), device="cpu", threads=1) as opened:
        yield opened


def test_loss_without_layers_is_the_loss_of_the_cut_model(session: Session, tmp_path: Path) -> None:
    teacher = tiny_model_dir(tmp_path, "llama_gqa_tied", num_hidden_layers=LAYERS)
    samples = training_samples(
        tiny_data_dir(tmp_path / "data"), num_samples=8, seq_len_tokens=32, seed=0, cache_dir=tmp_path / "index"
    )
    batches = [
        batch
        for step in range(2)
        for batch in step_batches(samples, session, step=step, global_batch_size=4, micro_batch_size=4)
    ]
    numbers = iter(range(1000))

    def cut_loss(*dropped: int) -> float:
        folder = tmp_path / f"cut{next(numbers)}"
        folder.mkdir()
        stage = SelectStage.model_validate({"kind": "select", "drop_layers": dropped})
        prune_checkpoint(teacher, choose_keep({}, Checkpoint.open(teacher).shape, stage), folder, SILENT)
        model, shape = load_model(folder, session, precision="fp64", seq_len_tokens=32)
        return sum_nll(model, HeldOutBatches(batches, 0), shape.vocab_size, session, SILENT).loss

    model, shape = load_model(teacher, session, precision="fp64", seq_len_tokens=32)
    keys: dict[str, Any] = {
        "layer_metrics": ("lm_loss", "logit_mse"),
        "block_lengths": (2, 3),
        "iterative_drops": DROPS,
    }
    params = ScoreStage.model_validate({"kind": "score", "seq_len_tokens": 32, "iterative_drops": DROPS, **keys})
    scores, _ = depth_scores(model, shape, params, DepthSamples(batches, None), session, SILENT)

    for length, name in ((1, "layers.lm_loss"), (2, "blocks.lm_loss.2"), (3, "blocks.lm_loss.3")):
        cut = [cut_loss(*range(start, start + length)) for start in range(LAYERS - length + 1)]
        assert scores[name].tolist() == pytest.approx(cut, rel=1e-10)

    logits_of = _logits_by_transformers(teacher, batches)
    gone: list[int] = []
    for number in range(1, DROPS + 1):
        gaps = {layer: logits_of((*gone, layer)) for layer in range(LAYERS) if layer not in gone}
        least = min(gaps, key=gaps.__getitem__)
        assert scores["iterative.logit_mse"][least] == number, gaps
        gone.append(least)

    gone = []
    for number in range(1, DROPS + 1):
        losses = {layer: cut_loss(*gone, layer) for layer in range(LAYERS) if layer not in gone}
        least = min(losses, key=losses.__getitem__)
        assert scores["iterative.lm_loss"][least] == number, losses
        gone.append(least)
    assert len(layers(model)) == LAYERS, "the model is whole again"


def _logits_by_transformers(teacher: Path, batches: list[Batch]) -> Callable[[Sequence[int]], float]:
    """Return a function of dropped layers: the squared difference from the logits of the whole model."""
    model = load_transformers(teacher, torch.float64)
    whole = list(model.model.layers)

    @torch.no_grad()
    def logits(dropped: Sequence[int]) -> torch.Tensor:
        model.model.layers = torch.nn.ModuleList(layer for n, layer in enumerate(whole) if n not in dropped)
        return torch.cat([model(batch["tokens"], use_cache=False).logits for batch in batches])

    expected = logits(())
    return lambda dropped: float((logits(dropped) - expected).square().mean())
