"""`make claims`: the papers' claims about distillation, tried on a small teacher that is trained here from nothing.

Prepares the teacher and its students with recipes/claims/students.yaml, trains every student of every experiment
with the package's own loop, and writes the "Distillation" part of docs/results.md. What has been trained is kept, so
that a stopped run goes on. Losses are held-out nats per token.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distillation_claims import write_page

from nemo_minitron.cli import load_recipe
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.stages.runner import RunOptions, run_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes/claims/students.yaml"
SEEDS = (1, 2, 3)
"""Of the order of the text, and of random weights and cuts."""
SIZES: dict[str, dict[str, int]] = {
    "cpu": {"steps": 80, "scratch_steps": 1400, "global_batch_size": 16, "seq_len_tokens": 128},
    "smoke": {"steps": 4, "scratch_steps": 6, "global_batch_size": 4, "seq_len_tokens": 64},
}
KL: dict[str, Any] = {"logits": {"kind": "forward_kl"}}
CE: dict[str, Any] = {"logits": None, "next_token": 1.0}


@dataclass(frozen=True)
class Trial:
    """One student, trained once."""

    name: str
    student: str
    """Stage of the recipe that made it; `{seed}` is filled in."""
    loss: dict[str, Any]
    seed: int
    teacher: str = "teacher"
    data: str = "data"
    share: float = 1.0
    """Of the steps."""
    lr: float = 2e-3
    then: str | None = None
    """Cut what was trained to the sizes of this stage, and train it again."""
    steps: str = "steps"
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name} #{self.seed}"


def logits(**keys: Any) -> dict[str, Any]:
    """A loss on logits alone."""
    return {"logits": {"kind": "forward_kl", **keys}}


def trials() -> Iterator[Trial]:
    """Every experiment; `KD` is the reference of most."""
    for seed in SEEDS:
        yield Trial("KD", "width", KL, seed)
        yield Trial("CE", "width", CE, seed)
        yield Trial("KD + CE", "width", {**KL, "next_token": 1.0}, seed)
        yield Trial("random init, KD", f"random_{seed}", KL, seed)
        yield Trial("random cut, KD", f"random_pruned_{seed}", KL, seed)
        for kind in ("reverse_kl", "jsd", "mse", "cosine"):
            yield Trial(kind, "width", logits(kind=kind), seed)
        for temperature in (0.5, 3.0):
            yield Trial(f"T {temperature:g}", "width", logits(temperature=temperature), seed)
        for k in (4, 16, 128):
            yield Trial(
                f"top {k}, tail dropped", "width", logits(sparse={"kind": "top_k", "k": k, "tail": "drop"}), seed
            )
        yield Trial("top 16, ghost", "width", logits(sparse={"kind": "top_k", "k": 16}), seed)
        for rounds in (12, 50):
            yield Trial(f"{rounds} draws", "width", logits(sparse={"kind": "sampled", "rounds": rounds}), seed)
        yield Trial("depth, KD", "depth", KL, seed)
        yield Trial("depth, KD + hidden", "depth", {**KL, "hidden": {}}, seed)
        yield Trial("width, KD + hidden", "width", {**KL, "hidden": {}}, seed)
        yield Trial("depth, reverse_kl", "depth", logits(kind="reverse_kl"), seed)
        yield Trial("two rounds", "halfway", KL, seed, share=0.5, then="width")
        yield Trial("other text, teacher as it is", "width", KL, seed, data="other_data")
        yield Trial("other text, corrected teacher", "width", KL, seed, teacher="corrected", data="other_data")
    for seed in SEEDS[:2]:
        yield Trial("from scratch, CE", f"random_{seed}", CE, seed, steps="scratch_steps", lr=3e-3)


def train(trial: Trial, run: Path, size: dict[str, int]) -> dict[str, Any]:
    """The curve of one trial; in a process of its own."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        student, steps = run / trial.student, max(2, round(size[trial.steps] * trial.share))
        started_s = time.monotonic()
        curve = _train(trial, student, run, steps, size, work / "first")
        if trial.then is not None:
            cut = _cut(work / "first/model", run, trial.then, work / "cut")
            curve += _train(trial, cut, run, steps, size, work / "second")
        wall_s = time.monotonic() - started_s
    gc.collect()
    return {"trial": asdict(trial), "curve": curve, "final": curve[-1], "wall_s": wall_s}


def _train(
    trial: Trial, student: Path, run: Path, steps: int, size: dict[str, int], work: Path
) -> list[dict[str, Any]]:
    from nemo_minitron.backends.megatron import distill, training
    from nemo_minitron.backends.megatron.session import open_session
    from nemo_minitron.config.schema import DistillStage, Parallel
    from nemo_minitron.progress import Progress

    work.mkdir(parents=True)
    params = DistillStage.model_validate(
        {
            "kind": "distill",
            "loss": trial.loss,
            "num_steps": steps,
            "global_batch_size": size["global_batch_size"],
            "seq_len_tokens": size["seq_len_tokens"],
            "lr": trial.lr,
            "min_lr": trial.lr / 20,
            "warmup_steps": max(1, steps // 10),
            "valid_interval_steps": max(1, steps // (8 if trial.steps == "steps" else 40)),
            "valid_num_tokens": 24576,
            "save_interval_steps": 10**6,
            "seed": trial.seed,
            "guard": None,
        }
    )
    parallel = Parallel(micro_batch_size=size["global_batch_size"])
    with open_session(parallel, device="cpu", threads=1) as session:
        job = distill.prepare(params, student, run / trial.teacher, run / trial.data, work, session)
        curves = training.run(job, work, Progress(silent=True))
        if trial.then is not None:
            (work / "model").mkdir()
            training.publish(job, student, work, work / "model")
    tokens = size["global_batch_size"] * size["seq_len_tokens"]
    kept = ("valid_loss", "valid_kl")
    return [
        {"tokens": row["step"] * tokens, **{key: row[key] for key in kept if key in row}}
        for row in curves.rows
        if "valid_loss" in row
    ]


def _cut(model: Path, run: Path, like: str, out: Path) -> Path:
    """Score the trained model anew and cut it to the sizes of another student."""
    from nemo_minitron.backends.megatron.datasets import step_batches, training_samples
    from nemo_minitron.backends.megatron.session import open_session
    from nemo_minitron.backends.megatron.stats import activation_scores
    from nemo_minitron.backends.megatron.weights import load_model
    from nemo_minitron.config.schema import Parallel, ScoreStage, SelectStage
    from nemo_minitron.hf.checkpoint import Checkpoint
    from nemo_minitron.progress import Progress
    from nemo_minitron.pruning.selection import choose_keep
    from nemo_minitron.pruning.slicing import prune_checkpoint

    sizes = Checkpoint.open(run / like).shape.sizes()
    target = {key: sizes[key] for key in ("hidden_size", "ffn_hidden_size")}
    params = ScoreStage.model_validate({"kind": "score", "seq_len_tokens": 128, "layer_metrics": ()})
    with open_session(Parallel(micro_batch_size=16), device="cpu", threads=1) as session:
        loaded, shape = load_model(model, session, precision="fp32", seq_len_tokens=128)
        samples = training_samples(run / "data", num_samples=64, seq_len_tokens=128, seed=0, cache_dir=out / "index")
        batches = [
            batch
            for step in range(4)
            for batch in step_batches(samples, session, step=step, global_batch_size=16, micro_batch_size=16)
        ]
        scores = activation_scores(loaded, shape, batches, params, session)
    plan = choose_keep(scores, shape, SelectStage.model_validate({"kind": "select", "target": target}))
    (out / "model").mkdir(parents=True)
    prune_checkpoint(model, plan, out / "model", Progress(silent=True))
    return out / "model"


def run_trials(run: Path, size: str, processes: int, file: Path, only: list[str]) -> dict[str, Any]:
    """Train what is not in the file yet; the longest first."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    todo = [trial for trial in trials() if trial.id not in found and (not only or trial.name in only)]
    todo.sort(key=lambda trial: trial.steps == "steps")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=8) as pool:
        jobs = {pool.submit(train, trial, run, SIZES[size]): trial for trial in todo}
        for number, job in enumerate(as_completed(jobs), 1):
            found[jobs[job].id] = job.result()
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1) + "\n")
            shutil.move(partial, file)
            last = found[jobs[job].id]
            print(
                f"{number}/{len(todo)} {jobs[job].id}: {last['final']['valid_loss']:.4f} in {last['wall_s']:.0f} s",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where models and figures are kept")
    parser.add_argument("--processes", type=int, default=2, help="trials at a time, of one thread each")
    parser.add_argument("--only", nargs="*", default=[], help="names of trials")
    parser.add_argument("overrides", nargs="*", help="of recipes/claims/students.yaml: source of the text, for one")
    arguments = parser.parse_intermixed_args()
    recipe = load_recipe(RECIPE, [f"execution.run_root={arguments.root}", *arguments.overrides])
    run_recipe(recipe, RunOptions())
    run = run_dir(recipe)
    found = run_trials(run, arguments.size, arguments.processes, run / f"trials_{arguments.size}.json", arguments.only)
    write_page(found, run, ROOT / "docs", arguments.size)


if __name__ == "__main__":
    main()
