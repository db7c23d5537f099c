"""Arms of the token-ratio suite: how each student is made and trained, as stages of a small recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from suite import Stages, Task, needed_stages
from token_ratio_claims import SCRATCH

from nemo_minitron.schema.base import FITTING_SEED

SWEEP_SEED = 0
"""Seed of the sweep; none of the seeds that count."""
LAYER_SHARE = 0.25
"""Share of the budget that layer-local distillation gets in its arm."""


@dataclass(frozen=True)
class Arm:
    """How a student is made before its distillation."""

    score: str = "activation"
    """`method` of the score stage."""
    mode: str | None = None
    """`mode` of the compensate stage. None: the student is only sliced."""
    layers: bool = False
    """Whether the layers are distilled one by one first."""
    from_scratch: bool = False
    """Whether the student keeps only its shape, has random weights, and learns from the text instead of the teacher."""


BASELINE = "sliced"
ARMS = {
    BASELINE: Arm(),
    "sliced_wanda": Arm(score="wanda"),
    "compensated": Arm(mode="one_shot"),
    "sequential": Arm(mode="sequential"),
    "compensated_layers": Arm(mode="one_shot", layers=True),
    SCRATCH: Arm(from_scratch=True),
}
LAYERS_KIND = "distill_layers"


@dataclass(frozen=True)
class Run:
    """One student, trained once; the learning rate decays to the end of the budget."""

    arm: str
    budget: int
    seed: int
    rate: float = 1.0
    """Factor of the learning rate of the recipe."""
    batch: float = 1.0
    """Factor of the batch of the recipe."""

    @property
    def id(self) -> str:
        sweep = "sweep: " if self.seed == SWEEP_SEED else ""
        return (
            f"{sweep}{self.arm}, {self.budget:,} tokens, seed {self.seed}, rate x {self.rate:.3g}, "
            f"batch x {self.batch:g}"
        )

    @property
    def slug(self) -> str:
        """Suffix of the names of stages that belong to this run alone."""
        rate, batch = (f"{factor:.3g}".replace(".", "p") for factor in (self.rate, self.batch))
        return f"{self.arm}_{self.budget}_s{self.seed}_r{rate}_b{batch}"


def usable_arms(kinds: Iterable[str], recipe: Stages) -> list[str]:
    """Return the arms whose kinds of stage exist; `from_scratch` needs a teacher that was trained here as well."""
    return [
        name
        for name, arm in ARMS.items()
        if (not arm.layers or LAYERS_KIND in kinds) and (not arm.from_scratch or recipe["teacher"]["kind"] == "train")
    ]


def fitting_seed(run: Run) -> int:
    """Return the seed of what fits the student before its distillation, which must not begin with the same text."""
    return FITTING_SEED + run.seed


def start_stages(run: Run, recipe: Stages) -> tuple[Stages, str]:
    """Return the stages that make the student of a run before its training, and the name of the last one.

    Runs of one seed share them, whatever their budget, rate and batch.
    """
    arm, seed = ARMS[run.arm], run.seed
    cut = f"{arm.score}_s{seed}"
    score, select, prune = (f"{kind}_{cut}" for kind in ("score", "select", "prune"))
    out: Stages = {
        score: {**recipe["score"], "method": arm.score, "seed": seed},
        select: _reading(recipe["select"], scores=score),
        prune: _reading(recipe["prune"], plan=select),
    }
    if arm.from_scratch:
        weights = f"random_s{seed}"
        init = {"kind": "init", "init_std": recipe["teacher_init"]["init_std"], "seed": seed, "inputs": {"like": prune}}
        return {**out, weights: init}, weights
    if arm.mode is None:
        return out, prune
    repair = f"compensate_{arm.mode}_{cut}"
    keys = {**recipe["compensate"], "mode": arm.mode, "seed": fitting_seed(run)}
    return {**out, repair: _reading(keys, student=prune, plan=select)}, repair


def _reading(stage: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    return {**stage, "inputs": {**stage["inputs"], **inputs}}


def training_stages(run: Run, recipe: Stages, start: str) -> Stages:
    """Return the trainings of a run, which split its budget."""
    arm = ARMS[run.arm]
    keys = _from_scratch(recipe) if arm.from_scratch else recipe["distill"]
    batch = max(1, round(keys["global_batch_size"] * run.batch))
    steps = run.budget // (batch * keys["seq_len_tokens"])
    layer_steps = round(steps * LAYER_SHARE) if arm.layers else 0
    out: Stages = {}
    if arm.layers:
        plan = f"select_{arm.score}_s{run.seed}"
        shared = {key: value for key, value in keys.items() if key in _OPTIMIZATION}
        made = {**shared, "kind": LAYERS_KIND, **_schedule(keys, run, layer_steps), "global_batch_size": batch}
        made["seed"] = fitting_seed(run)
        out[f"layers_{run.slug}"] = {**made, "inputs": {"student": start, "plan": plan}}
        start = f"layers_{run.slug}"
    training = {**keys, **_schedule(keys, run, steps - layer_steps), "global_batch_size": batch}
    model = "model" if arm.from_scratch else "student"
    return {**out, f"distill_{run.slug}": _reading(training, **{model: start})}


def _from_scratch(recipe: Stages) -> dict[str, Any]:
    """Return the training that made the teacher, with what the distillations have in common."""
    return {**recipe["teacher"], **{key: recipe["distill"][key] for key in _OPTIMIZATION}}


_OPTIMIZATION = ("seq_len_tokens", "precision", "valid_num_tokens", "save_interval_steps")


def _schedule(keys: dict[str, Any], run: Run, steps: int) -> dict[str, Any]:
    """Return the keys of a training that decays to its last step, with the warmup's share and final rate as there."""
    return {
        "num_steps": steps,
        "lr": keys["lr"] * run.rate,
        "min_lr": keys["min_lr"] * run.rate,
        "warmup_steps": max(1, round(steps * keys["warmup_steps"] / keys["num_steps"])),
        "valid_interval_steps": steps,
        "seed": run.seed,
    }


def task_of(run: Run, recipe: Stages, micro_batch_size: int) -> Task:
    """Return the task of a run: its stages, what is measured, and the tokens that count."""
    from_scratch = ARMS[run.arm].from_scratch
    made, start = start_stages(run, recipe)
    trained = training_stages(run, recipe, start)
    last = list(trained)[-1]
    measured: Stages = {}
    measures = {}
    for text, template in (("own", "evaluate"), ("other", "evaluate_other")):
        for when, model, name in (("", last, run.slug), ("start ", start, start)):
            stage = f"{text}_{name}"
            measured[stage] = _reading({**recipe[template], "label": stage}, model=model)
            measures[f"{when}{text}"] = stage
    stages = needed_stages({**recipe, **made, **trained, **measured}, list(measured))
    facts = {
        "run": asdict(run),
        "is_sweep": run.seed == SWEEP_SEED,
        "calibration_tokens": 0 if from_scratch else calibration_tokens(made),
        "training_tokens": sum(training_tokens(stage) for stage in trained.values()),
        "counted_stages": [*([] if from_scratch else made), *trained],
    }
    batch = min(stages[name]["global_batch_size"] for name in trained)
    return Task(
        id=run.id,
        group=run.arm,
        work=run.budget,
        stages=stages,
        measures=measures,
        temporary=tuple(trained),
        micro_batch_size=min(micro_batch_size, batch),
        facts=facts,
    )


def calibration_tokens(stages: Stages) -> int:
    """Count the tokens that scoring and repair read, including the text on which damping is chosen."""
    reads = [stage for stage in stages.values() if "num_samples" in stage]
    return sum(stage["num_samples"] * stage["seq_len_tokens"] + stage.get("heldout_tokens", 0) for stage in reads)


def training_tokens(stage: dict[str, Any]) -> int:
    """Count the tokens of a training."""
    return int(stage["num_steps"] * stage["global_batch_size"] * stage["seq_len_tokens"])
