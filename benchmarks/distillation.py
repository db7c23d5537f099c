"""`make claims`: the papers' claims about distillation, tried on a small teacher that is trained here from nothing.

Prepares the teacher and its students with a recipe of recipes/claims, trains every student of every experiment
with the package's own loop, and writes the "Distillation" part of docs/results.md. What has been trained is kept, so
that a stopped run goes on. Losses are held-out nats per token. Sizes: cpu (two cores), gpu (SmolLM2-135M), smoke (does
it run).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from distillation_claims import write_page

from nemo_minitron import api
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.safe_files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes/claims"
CALIBRATION_SAMPLES = 64
SEEDS = (1, 2, 3)
"""Of the order of the text, and of random weights and cuts."""
CUT_KINDS = ("score", "select", "prune")
"""Kinds of the stages that a trial with a second cut goes through."""
KL: dict[str, Any] = {"logits": {"kind": "forward_kl"}}
CE: dict[str, Any] = {"logits": None, "next_token": 1.0}


@dataclass(frozen=True)
class Size:
    """How much is trained, and where."""

    recipe: str
    """Makes the teacher and the students."""
    steps: int
    scratch_steps: int
    global_batch_size: int
    micro_batch_size: int
    seq_len_tokens: int
    valid_num_tokens: int = 24576
    lr_factor: float = 1.0
    """On the learning rates of the trials, which are those of the small teacher's students."""
    device: Literal["cpu", "cuda"] = "cpu"
    text: str = "stages.teacher_init.tokenizer.sources.0.source"
    """Key of the recipe that names the text."""
    overrides: tuple[str, ...] = ()
    """Of the recipe."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len_tokens


SIZES = {
    "cpu": Size("students", 80, 1400, global_batch_size=16, micro_batch_size=16, seq_len_tokens=128),
    "gpu": Size(
        "smollm2_135m",
        # 20M tokens a student, 200M from scratch.
        steps=305,
        scratch_steps=3050,
        global_batch_size=64,
        micro_batch_size=16,
        seq_len_tokens=1024,
        valid_num_tokens=262_144,
        lr_factor=0.25,
        device="cuda",
        text="stages.data.sources.0.source",
    ),
    "smoke": Size(
        "students",
        4,
        6,
        global_batch_size=4,
        micro_batch_size=4,
        seq_len_tokens=64,
        valid_num_tokens=512,
        overrides=(
            "name=claims/smoke",
            "stages.data.sources.0.max_documents=20",
            "stages.other_data.sources.0.max_documents=400",
            "stages.teacher.num_steps=10",
            "stages.teacher.warmup_steps=2",
            "stages.teacher.valid_num_tokens=1024",
            "stages.corrected.num_steps=4",
            "stages.corrected.warmup_steps=1",
            "stages.corrected.valid_num_tokens=1024",
        ),
    ),
}


@dataclass(frozen=True)
class Trial:
    """One student, trained once."""

    name: str
    student: str
    """Stage of the recipe that made it."""
    loss: dict[str, Any]
    seed: int
    teacher: str = "teacher"
    data: str = "data"
    share: float = 1.0
    """Of the steps."""
    lr: float = 2e-3
    then: str | None = None
    """Cut what was trained to the sizes of this stage, and train it again."""
    from_scratch: bool = False
    """Trained for `scratch_steps`."""

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
        for temperature in (0.1, 0.5, 3.0):
            yield Trial(f"T {temperature:g}", "width", logits(temperature=temperature), seed)
        for k in (4, 16, 64, 128):
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
        yield Trial("from scratch, CE", f"random_{seed}", CE, seed, from_scratch=True, lr=3e-3)


def made_from(trial: Trial, run: Path, size: Size) -> str:
    """Hash of all that the figures of a trial depend on: its keys, the models and text as the run made them, and the
    versions of the stages that it goes through.
    """
    stages = (trial.student, trial.teacher, trial.data, *((trial.then,) if trial.then else ()))
    facts = {
        "trial": asdict(trial),
        "size": asdict(size),
        "stages": [json.loads((run / stage / "manifest.json").read_text())["fingerprint"] for stage in stages],
        "versions": {kind: STAGES[kind].version for kind in ("distill", *(CUT_KINDS if trial.then else ()))},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def train(trial: Trial, run: Path, size: Size) -> dict[str, Any]:
    """The curve of one trial; in a process of its own."""
    import torch

    if size.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        student, all_steps = run / trial.student, size.scratch_steps if trial.from_scratch else size.steps
        steps = max(2, round(all_steps * trial.share))
        started_s = time.monotonic()
        curve = _train(trial, student, run, steps, size, work / "first")
        if trial.then is not None:
            cut = _cut(work / "first/model", run, trial.then, work / "cut", size)
            before = curve[-1]["tokens"]
            second = _train(trial, cut, run, steps, size, work / "second")
            curve += [{**row, "tokens": row["tokens"] + before} for row in second]
        wall_s = time.monotonic() - started_s
    gc.collect()
    origin = made_from(trial, run, size)
    return {"trial": asdict(trial), "made_from": origin, "curve": curve, "final": curve[-1], "wall_s": wall_s}


def _train(trial: Trial, student: Path, run: Path, steps: int, size: Size, work: Path) -> list[dict[str, Any]]:
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training
    from nemo_minitron.schema.execution import Parallel
    from nemo_minitron.stages.distill.params import DistillStage
    from nemo_minitron.system.progress import Progress

    work.mkdir(parents=True)
    params = DistillStage.model_validate(_keys(trial, steps, size))
    parallel = Parallel(micro_batch_size=size.micro_batch_size)
    with open_session(parallel, device=size.device, threads=1) as session:
        job = distill.prepare(params, student, run / trial.teacher, run / trial.data, work, session)
        curves = training.run(job, work, Progress(silent=True))
        if trial.then is not None:
            (work / "model").mkdir()
            training.publish(job, student, work, work / "model")
    kept = ("valid_loss", "valid_kl")
    return [
        {"tokens": row["step"] * size.tokens_per_step, **{key: row[key] for key in kept if key in row}}
        for row in curves.rows
        if "valid_loss" in row
    ]


def _keys(trial: Trial, steps: int, size: Size) -> dict[str, Any]:
    """The distill stage of a trial."""
    return {
        "kind": "distill",
        "loss": trial.loss,
        "num_steps": steps,
        "global_batch_size": size.global_batch_size,
        "seq_len_tokens": size.seq_len_tokens,
        "lr": trial.lr * size.lr_factor,
        "min_lr": trial.lr * size.lr_factor / 20,
        "warmup_steps": max(1, steps // 10),
        "valid_interval_steps": max(1, steps // (40 if trial.from_scratch else 8)),
        "valid_num_tokens": size.valid_num_tokens,
        "save_interval_steps": 10**6,
        "seed": trial.seed,
        "guard": None,
    }


def _cut(model: Path, run: Path, like: str, out: Path, size: Size) -> Path:
    """Score the trained model anew and cut it to the sizes of another student."""
    from nemo_minitron.backends.megatron.data.datasets import step_batches, training_samples
    from nemo_minitron.backends.megatron.model.weights import load_model
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.scoring.stats import activation_scores
    from nemo_minitron.hf.checkpoint import Checkpoint
    from nemo_minitron.pruning.selection import choose_keep
    from nemo_minitron.pruning.slicing import prune_checkpoint
    from nemo_minitron.schema.execution import Parallel
    from nemo_minitron.stages.score.params import ScoreStage
    from nemo_minitron.stages.select.params import SelectStage
    from nemo_minitron.system.progress import Progress

    sizes = Checkpoint.open(run / like).shape.sizes()
    target = {key: sizes[key] for key in ("hidden_size", "ffn_hidden_size")}
    params = ScoreStage.model_validate({"kind": "score", "seq_len_tokens": size.seq_len_tokens, "layer_metrics": ()})
    batch, length = size.micro_batch_size, size.seq_len_tokens
    steps = max(1, CALIBRATION_SAMPLES // batch)
    with open_session(Parallel(micro_batch_size=batch), device=size.device, threads=1) as session:
        loaded, shape = load_model(model, session, precision="fp32", seq_len_tokens=length)
        samples = training_samples(
            run / "data", num_samples=steps * batch, seq_len_tokens=length, seed=0, cache_dir=out / "index"
        )
        batches = [
            micro
            for step in range(steps)
            for micro in step_batches(samples, session, step=step, global_batch_size=batch, micro_batch_size=batch)
        ]
        scores = activation_scores(loaded, shape, batches, params, session)
    plan = choose_keep(scores, shape, SelectStage.model_validate({"kind": "select", "target": target}))
    (out / "model").mkdir(parents=True)
    prune_checkpoint(model, plan, out / "model", Progress(silent=True))
    return out / "model"


def run_trials(run: Path, size: Size, pool: Executor, file: Path, only: list[str]) -> dict[str, Any]:
    """Train what is not in the file yet, the longest first, and close the pool.

    Raises:
        RuntimeError: a trial failed. Those that had begun by then were finished and stored.
    """
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    wanted = [trial for trial in trials() if not only or trial.name in only]
    require_same_origin(found, wanted, run, size, file)
    todo = sorted((trial for trial in wanted if trial.id not in found), key=lambda trial: not trial.from_scratch)
    with pool:
        jobs = {pool.submit(train, trial, run, size): trial.id for trial in todo}
        try:
            for number, (name, last) in enumerate(_results(jobs), 1):
                found[name] = last
                write_whole(file, json.dumps(found, indent=1) + "\n")
                loss, wall_s = last["final"]["valid_loss"], last["wall_s"]
                print(f"{number}/{len(todo)} {name}: {loss:.4f} in {wall_s:.0f} s", flush=True)
        finally:
            # After Ctrl-C or on a full disk, the pool would train all others before it closes.
            for job in jobs:
                job.cancel()
    return found


def _results(jobs: dict[Future[dict[str, Any]], str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and result of each job that succeeds, as they finish. After a failure no other job begins."""
    waiting, failed = set(jobs), list[Future[dict[str, Any]]]()
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        failed += [job for job in done if job.exception() is not None]
        if failed:
            waiting = {job for job in waiting if not job.cancel()}
        yield from ((jobs[job], job.result()) for job in done if job.exception() is None)
    if failed:
        raise RuntimeError(
            f"The trial {jobs[failed[0]]} failed. Those that finished are stored; the same command trains the others."
        ) from failed[0].exception()


def require_same_origin(found: dict[str, Any], wanted: list[Trial], run: Path, size: Size, file: Path) -> None:
    """Figures that are kept are of these models, this text and these keys; mixed ones would compare nothing."""
    other = [
        trial.id
        for trial in wanted
        if trial.id in found and found[trial.id].get("made_from") != made_from(trial, run, size)
    ]
    if other:
        raise SystemExit(
            f"{file} holds figures of other models, text or keys ({len(other)} trials: {', '.join(other[:3])} ...).\n"
            "Next: move the file away to train them again, or give this run another name: name=claims/NAME."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where models and figures are kept")
    parser.add_argument("--processes", type=int, help="trials at a time, of one thread each: 2, on a GPU 1")
    parser.add_argument("--only", action="append", default=[], help="name of a trial; can be given again")
    parser.add_argument("--text", help="path or glob of the text, its documents told apart by form feeds")
    parser.add_argument("overrides", nargs="*", help="of any key of the recipe")
    arguments = parser.parse_intermixed_args()
    size = SIZES[arguments.size]
    text = [f"{size.text}={arguments.text}"] if arguments.text else []
    overrides = [f"execution.run_root={arguments.root}", *size.overrides, *text, *arguments.overrides]
    recipe = api.load_recipe(RECIPES / f"{size.recipe}.yaml", overrides)
    known = {trial.name for trial in trials()}
    if not known.issuperset(arguments.only):
        parser.error(f"no trial {sorted(set(arguments.only) - known)}; there are: {', '.join(sorted(known))}")
    run, processes = api.run(recipe), arguments.processes or (2 if size.device == "cpu" else 1)
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    found = run_trials(run, size, pool, run / f"trials_{arguments.size}.json", arguments.only)
    if arguments.only or arguments.size == "smoke":
        print("docs/results.md stays as it is: it is written from all trials of a real size.")
    else:
        write_page(found, run, ROOT / "docs", arguments.size)


if __name__ == "__main__":
    main()
