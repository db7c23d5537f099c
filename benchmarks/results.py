"""`make results`: test the papers' claims about pruning on SmolLM2-135M and write that part of docs/results.md.

Everything is zero-shot: cut, not trained. Held-out loss in nats per token; lower is better. Where calibration
samples play a part, three draws of them are tried. What has been measured is kept, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from claims import BEGIN, END, render
from pages import replace_part

from nemo_minitron import api
from nemo_minitron.artifacts.manifest import MANIFEST_FILE
from nemo_minitron.backends.megatron.data.datasets import (
    HeldOutBatches,
    heldout_batches,
    step_batches,
    training_samples,
)
from nemo_minitron.backends.megatron.model.evaluate import sum_nll
from nemo_minitron.backends.megatron.model.forward import Batch
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.session import Session, open_session
from nemo_minitron.backends.megatron.scoring.depth_scores import DepthSamples, depth_scores, task_batches
from nemo_minitron.backends.megatron.scoring.removal import effects_of_removal
from nemo_minitron.backends.megatron.scoring.stats import activation_scores
from nemo_minitron.evaluation.choice_task import ChoiceTask, load_choice_task
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.pruning.depth import task_error
from nemo_minitron.pruning.magnitude import magnitude_scores
from nemo_minitron.pruning.selection import choose_keep
from nemo_minitron.pruning.slicing import prune_checkpoint
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.stages.score.params import ScoreStage
from nemo_minitron.stages.select.params import SelectStage
from nemo_minitron.system.progress import Progress
from nemo_minitron.system.safe_files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes/smollm2_135m/width.yaml"
AGGREGATIONS = ("mean", "l2", "var")
SEEDS = (1, 2, 3)
WIDTH = {"hidden_size": 512, "ffn_hidden_size": 1152, "num_attention_heads": 6}
"""Three axes at once, as in table 11 of 2407.14679."""
HEADS = {"num_attention_heads": 6}
HALF = {"num_layers": 15}
ROUNDS_TARGET = 448
CHOOSE_TASK, MEASURE_TASK = "arc_easy", "openbookqa"
"""Layers are chosen by one task and measured by another: no examples are seen twice. Both have short questions."""
CHOOSE_EXAMPLES, MEASURE_EXAMPLES = 50, 200
SILENT = Progress(silent=True)
Scores = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Bench:
    """The teacher, its text, and a place for students."""

    run: Path
    scratch: Path
    session: Session
    heldout: HeldOutBatches
    choose: ChoiceTask
    measure: ChoiceTask

    @property
    def teacher(self) -> Path:
        return self.run / "teacher"

    def batches(self, seed: int, num_samples: int = 16) -> list[Batch]:
        """Calibration samples of 256 tokens."""
        cache = self.scratch / "index"
        samples = training_samples(
            self.run / "data", num_samples=num_samples, seq_len_tokens=256, seed=seed, cache_dir=cache
        )
        return [
            batch
            for step in range(num_samples // 4)
            for batch in step_batches(samples, self.session, step=step, global_batch_size=4, micro_batch_size=4)
        ]

    def widths(self, seed: int, model: Path | None = None, **keys: Any) -> Scores:
        """Width scores of the teacher, or of another model."""
        stage = {"kind": "score", "seq_len_tokens": 256, "layer_metrics": (), **keys}
        loaded, shape = load_model(model or self.teacher, self.session, precision="bf16", seq_len_tokens=256)
        params = ScoreStage.model_validate(stage)
        return activation_scores(loaded, shape, self.batches(seed), params, self.session)

    def cut(self, scores: Scores, model: Path | None = None, name: str = "student", **keys: Any) -> Path:
        """A student on disk."""
        source = model or self.teacher
        out = Path(tempfile.mkdtemp(dir=self.scratch, prefix=name))
        params = SelectStage.model_validate({"kind": "select", **keys})
        prune_checkpoint(source, choose_keep(scores, Checkpoint.open(source).shape, params), out, SILENT)
        return out

    def loss(self, model: Path) -> float:
        """Held-out loss, nats per token."""
        loaded, shape = load_model(model, self.session, precision="bf16", seq_len_tokens=256)
        return sum_nll(loaded, self.heldout, shape.vocab_size, self.session, SILENT).loss

    def accuracy(self, model: Path) -> float:
        """On the task that nothing was chosen by, zero-shot."""
        loaded, shape = load_model(model, self.session, precision="bf16", seq_len_tokens=256)
        metric = task_error(len(self.measure.pairs), lambda total: self.measure.accuracy(total.tolist()))
        batches = task_batches(self.measure, self.session)
        found = effects_of_removal(loaded, shape, batches, [], {"task": metric}, self.session, SILENT)
        return 1.0 - found.whole["task"]

    def loss_of(self, scores: Scores, **keys: Any) -> float:
        """Cut, measure, throw away."""
        folder = self.cut(scores, **keys)
        found = self.loss(folder)
        gc.collect()  # Megatron's models refer to themselves
        for file in folder.iterdir():
            file.unlink()
        return found


def teacher(bench: Bench) -> dict[str, Any]:
    """The model that is pruned."""
    return {"loss": bench.loss(bench.teacher), "accuracy": bench.accuracy(bench.teacher)}


def aggregations(bench: Bench) -> dict[str, Any]:
    """Batch and sequence aggregation: mean over the draws, and each draw."""
    out = {}
    for batch, sequence in itertools.product(AGGREGATIONS, AGGREGATIONS):
        keys: dict[str, Any] = {"batch_aggregation": batch, "sequence_aggregation": sequence}
        out[f"{batch},{sequence}"] = [bench.loss_of(bench.widths(seed, **keys), target=WIDTH) for seed in SEEDS]
    return out


def methods(bench: Bench) -> dict[str, Any]:
    """What indices are chosen by."""
    checkpoint = Checkpoint.open(bench.teacher)
    rules = SelectStage.model_validate({"kind": "select", "target": WIDTH, "method": "magnitude"})
    score: dict[str, Callable[[int], Scores]] = {
        "importance, modelopt": lambda seed: bench.widths(seed),
        "importance, paper": lambda seed: bench.widths(seed, convention="paper"),
        "taylor": lambda seed: bench.widths(seed, method="taylor"),
    }
    out = {name: [bench.loss_of(make(seed), target=WIDTH) for seed in SEEDS] for name, make in score.items()}
    network = [bench.loss_of(bench.widths(seed), target=WIDTH, ranking="network") for seed in SEEDS]
    out["importance, one order for all layers"] = network
    out["magnitude"] = [bench.loss_of(magnitude_scores(checkpoint, rules), target=WIDTH, method="magnitude")]
    out["random"] = [bench.loss_of({}, target=WIDTH, method="random", seed=seed) for seed in SEEDS]
    return out


def merging(bench: Bench) -> dict[str, Any]:
    """Nine query heads in three groups: one head of each group goes."""
    return {
        how: [bench.loss_of(bench.widths(seed), target=HEADS, head_merge=how) for seed in SEEDS]
        for how in ("off", "printed", "opposite", "mean")
    }


def rounds(bench: Bench) -> dict[str, Any]:
    """Importance measured anew on the way down: hidden size in 1, 2 or 4 cuts."""
    out: dict[str, Any] = {}
    whole = Checkpoint.open(bench.teacher).shape.hidden_size
    for count in (1, 2, 4):
        losses = []
        for seed in SEEDS:
            model = bench.teacher
            for number in range(1, count + 1):
                size = whole - number * (whole - ROUNDS_TARGET) // count
                model = bench.cut(bench.widths(seed, model), model, target={"hidden_size": size})
            losses.append(bench.loss(model))
        out[str(count)] = losses
    return out


def half_depth(bench: Bench) -> dict[str, Any]:
    """15 of 30 layers go, by every metric and manner of removal: loss and accuracy on the task."""
    metrics = ("block_influence", "lm_loss", "logit_mse", "task")
    stage = {"kind": "score", "seq_len_tokens": 256, "layer_metrics": metrics, "width_axes": (), "block_lengths": (15,)}
    params = ScoreStage.model_validate(stage)
    model, shape = load_model(bench.teacher, bench.session, precision="bf16", seq_len_tokens=256)
    batches = bench.batches(SEEDS[0], 8)
    scores = activation_scores(model, shape, bench.batches(SEEDS[0]), params, bench.session)
    samples = DepthSamples(batches, bench.choose)
    scores |= depth_scores(model, shape, params, samples, bench.session, SILENT)[0]
    one_by_one = params.model_copy(
        update={"layer_metrics": ("block_influence", "lm_loss"), "block_lengths": (), "iterative_drops": 15}
    )
    scores |= depth_scores(model, shape, one_by_one, samples, bench.session, SILENT)[0]
    out = {}
    cases = [(metric, removal) for metric in metrics for removal in ("individual", "contiguous")]
    cases += [("block_influence", "iterative"), ("lm_loss", "iterative")]
    for metric, removal in cases:
        keys: dict[str, Any] = {"layer_metric": metric, "layer_removal": removal, "target": HALF}
        plan = choose_keep(scores, shape, SelectStage.model_validate({"kind": "select", **keys}))
        folder = bench.cut(scores, **keys)
        kept = [layer for layer in range(shape.num_layers) if layer in plan.layers]
        out[f"{metric}, {removal}"] = {
            "loss": bench.loss(folder), "accuracy": bench.accuracy(folder), "kept": kept
        }  # fmt: skip
    folders = [bench.cut({}, target=HALF, method="random", seed=seed) for seed in SEEDS]
    out["random"] = {
        "loss": mean(map(bench.loss, folders)), "accuracy": mean(map(bench.accuracy, folders)), "kept": []
    }  # fmt: skip
    return out


EXPERIMENTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "teacher": teacher,
    "aggregations": aggregations,
    "methods": methods,
    "merging": merging,
    "rounds": rounds,
    "half_depth": half_depth,
}


def made_from(run: Path) -> str:
    """Hash of the teacher and the text as the run made them, and of the versions of the stages that prune."""
    facts = {
        "stages": [
            json.loads((run / stage / MANIFEST_FILE).read_text())["fingerprint"] for stage in ("teacher", "data")
        ],
        "versions": {kind: STAGES[kind].version for kind in ("score", "select", "prune", "evaluate")},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def missing(names: Sequence[str], found: Mapping[str, Any], origin: str, file: Path, *, again: bool) -> list[str]:
    """Return the experiments to run: those without figures, or all of them.

    Raises:
        SystemExit: figures that are kept are of another teacher, text or version of a stage.
    """
    todo = [name for name in names if again or name not in found]
    made = found.get("made_from", {})
    other = [name for name in EXPERIMENTS if name in found and name not in todo and made.get(name) != origin]
    if other:
        raise SystemExit(
            f"{file} has figures of another teacher, other text or other versions of a stage: {', '.join(other)}.\n"
            "Next: measure everything again: make results ARGS=--again"
        )
    return todo


def measure(names: Sequence[str], bench: Bench, found: dict[str, Any], origin: str, file: Path) -> None:
    """Run experiments. Their figures are stored after each, so that a stopped run has lost one at most."""
    for name in names:
        found.pop(name, None)
    for name in names:
        started_s = time.monotonic()
        found[name] = EXPERIMENTS[name](bench)
        found.setdefault("made_from", {})[name] = origin
        write_whole(file, json.dumps(found, indent=2) + "\n")
        print(f"{name}: {time.monotonic() - started_s:.0f} s", flush=True)


@contextmanager
def open_bench(run: Path) -> Iterator[Bench]:
    """Load what all experiments share, in a session of its own."""
    with open_session(Parallel(micro_batch_size=4), device="cpu") as session, tempfile.TemporaryDirectory() as scratch:
        heldout = heldout_batches(run / "data", session, num_tokens=8192, seq_len_tokens=256, batch_size=4)
        tokenizer, data = load_tokenizer(run / "teacher"), ROOT / "assets/offline-eval-tasks"
        asked = ((CHOOSE_TASK, CHOOSE_EXAMPLES), (MEASURE_TASK, MEASURE_EXAMPLES))
        tasks = [load_choice_task(task, tokenizer, data_dir=data, limit=limit) for task, limit in asked]
        yield Bench(run, Path(scratch), session, heldout, *tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(EXPERIMENTS), choices=EXPERIMENTS, help="experiments to run")
    parser.add_argument("--again", action="store_true", help="also run those that have figures")
    parser.add_argument("--root", type=Path, default=Path("runs/results"), help="where models and figures are kept")
    arguments = parser.parse_args()
    recipe = api.load_recipe(RECIPE, [f"execution.run_root={arguments.root}"])
    run, file = api.run(recipe, until="check_teacher"), arguments.root / "results.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    origin = made_from(run)
    todo = missing(arguments.only, found, origin, file, again=arguments.again)
    if todo:
        with open_bench(run) as bench:
            measure(todo, bench, found, origin, file)
    if EXPERIMENTS.keys() <= found.keys():
        replace_part(ROOT / "docs/results.md", BEGIN, END, render(found))


if __name__ == "__main__":
    main()
