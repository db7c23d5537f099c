"""Repair of tiny pruned models, for tests on several ranks. Importable, so that spawned processes find it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_minitron.backends.megatron.compensation import repair
from nemo_minitron.backends.megatron.compensation.repair import LayerRepair, Models, Weights, repaired_layers
from nemo_minitron.backends.megatron.compensation.runner import LayerRunner
from nemo_minitron.backends.megatron.compensation.streams import calibration_batches, embedded, heldout_batches
from nemo_minitron.backends.megatron.model.build import DTYPES
from nemo_minitron.backends.megatron.runtime.session import Session, open_session
from nemo_minitron.errors import Interrupted
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.compensation import Repair
from nemo_minitron.pruning.plan_file import PrunePlan, read_plan, write_plan
from nemo_minitron.pruning.selection import choose_keep
from nemo_minitron.pruning.slicing import prune_checkpoint
from nemo_minitron.schema.execution import Execution, Parallel
from nemo_minitron.schema.pruning import Compensation, Selection, Target
from nemo_minitron.stages.artifacts import TokenizedText
from nemo_minitron.stages.common.compensation import RepairTexts, repair_model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

Arrays = dict[str, NDArray]
Layers = list[tuple[Arrays, dict[str, Repair] | None]]
SMALL = Compensation(num_samples=24, heldout_tokens=256, seq_len_tokens=32)


def cut_model(root: Path, case: str, target: Target, **model: Any) -> Path:
    """Make teacher, student, plan and data of a case below `root`; the cut is random."""
    teacher = tiny_model_dir(root / "teacher", case, **model)
    source = Checkpoint.open(teacher).shape
    return cut_by(root, teacher, choose_keep({}, source, Selection(method="random", target=target)))


def cut_by(root: Path, teacher: Path, plan: PrunePlan) -> Path:
    """Cut a teacher by a plan; make student, plan and data below `root`."""
    for name in ("plan", "student"):
        (root / name).mkdir(parents=True, exist_ok=True)
    write_plan(plan, Checkpoint.open(teacher).shape, root / "plan")
    prune_checkpoint(teacher, plan, root / "student", Progress(silent=True))
    tiny_data_dir(root / "data")
    return teacher


def models_in(root: Path, teacher: Path) -> Models:
    """Open the models that `cut_by` has made."""
    checkpoint = Checkpoint.open(teacher)
    return Models(checkpoint, Checkpoint.open(root / "student"), read_plan(root / "plan", checkpoint.shape))


def repair_layers(
    root: Path,
    teacher: Path,
    cases: Mapping[str, Compensation],
    parallel: Parallel,
    work: Path,
    done: Mapping[int, Arrays] | None = None,
) -> dict[str, Layers]:
    """Repair the student in every way of `cases`, in one session; returns (weights, repairs) of each layer."""
    with open_session(parallel, device="cpu", threads=1) as session:
        return {name: _repair_layers(root, teacher, params, session, work, done) for name, params in cases.items()}


def repair_with_doubts(root: Path, teacher: Path, cases: Mapping[str, Compensation], *args: Any) -> dict[str, Layers]:
    """Repair as `repair_layers` does, but only the first rank finds that a repair is better than slicing."""
    if os.environ["RANK"] != "0":
        found = repair.best_repair
        repair.best_repair = lambda *some: replace(found(*some), update=None)
    return repair_layers(root, teacher, cases, *args)


def _repair_layers(
    root: Path, teacher: Path, params: Compensation, session: Session, work: Path, done: Mapping[int, Arrays] | None
) -> Layers:
    models = models_in(root, teacher)
    text = {"seq_len_tokens": params.seq_len_tokens}
    samples = {"num_samples": params.num_samples, "seed": params.seed, "cache_dir": work}
    calibration = calibration_batches(root / "data", session, **text, **samples)
    heldout = heldout_batches(root / "data", session, **text, num_tokens=params.heldout_tokens)
    embeddings = (models.teacher.embeddings(), models.student.embeddings())
    streams = embedded([*calibration, *heldout], *embeddings, DTYPES[params.precision])
    layers = repaired_layers(
        LayerRepair(models, params, session), streams, {number: _tensors(some) for number, some in (done or {}).items()}
    )
    return [(_arrays(weights), _numbers(found)) for _, weights, found in layers]


def repair_stage(root: Path, teacher: Path, parallel: Parallel, run_dir: Path, params: Compensation = SMALL) -> str:
    """Repair the student of `root` as a stage does, below `run_dir`; return the message of an interruption, or "".

    Only rank 0 reads the file by which a user requests a stop, as in a run.
    """
    text = TokenizedText("data", "tokenize", root / "data", "", {})
    stop = StopRequest(run_dir if os.environ["RANK"] == "0" else None)
    with open_session(parallel, device="cpu", threads=1) as session:
        out, work = run_dir / "out", run_dir / "work"
        ctx = StageContext("compensate", "test", out, work, Execution(), Progress(silent=True), session, stop)
        folders = (teacher, root / "student", root / "plan")
        try:
            repair_model(params, *folders, RepairTexts(text, text), ctx, out)
        except Interrupted as error:
            return str(error)
    return ""


def calibration_tokens(root: Path, params: Compensation, work: Path) -> NDArray:
    """Return the tokens of the calibration text [N, S]; for one process."""
    keys = {"num_samples": params.num_samples, "seq_len_tokens": params.seq_len_tokens, "seed": params.seed}
    with open_session(Parallel(micro_batch_size=1), device="cpu", threads=1) as session:
        batches = calibration_batches(root / "data", session, **keys, cache_dir=work)
    return torch.cat([batch.tokens for batch in batches]).numpy()


def activations_up_to_each_site(teacher: Path) -> dict[str | None, dict[str, NDArray]]:
    """Run a layer up to each site, and to its end (None); return its activations, by name."""
    checkpoint, out = Checkpoint.open(teacher), dict[str | None, dict[str, NDArray]]()
    with open_session(Parallel(), device="cpu", threads=1) as session:
        runner = LayerRunner(checkpoint.shape, session, "fp32", 16)
        runner.load(0, lambda parameter: checkpoint.read(parameter.hf))
        stream = torch.randn(16, 2, checkpoint.shape.hidden_size, generator=torch.Generator().manual_seed(1))
        for last in (None, "attention_input", "attention_output", "mlp_input", "mlp_output"):
            found = runner.activations(stream, last)
            blocks = {f"before {block}": tensor for block, tensor in found.before.items()}
            ends = {} if found.end is None else {"end": found.end}
            out[last] = {name: tensor.numpy() for name, tensor in {**found.inputs, **blocks, **ends}.items()}
    return out


def _arrays(weights: Weights) -> Arrays:
    """Convert to arrays, which survive the end of the process that made them."""
    return {name: tensor.numpy() for name, tensor in weights.items()}


def _tensors(arrays: Arrays) -> Weights:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _numbers(found: dict[str, Repair] | None) -> dict[str, Repair] | None:
    return None if found is None else {site: replace(one, update=None) for site, one in found.items()}


def updates(layers: Layers, root: Path) -> dict[str, Tensor]:
    """Return what the repair added to each weight of the student, fp64."""
    student = Checkpoint.open(root / "student")
    return {
        name: tensor.double() - student.read(name).double()
        for weights, _ in layers
        for name, tensor in _tensors(weights).items()
    }


def with_weights(layers: Layers, model: torch.nn.Module) -> torch.nn.Module:
    """Put the repaired weights into the student that transformers has loaded."""
    state = model.state_dict()
    for weights, _ in layers:
        for name, tensor in _tensors(weights).items():
            state[name].copy_(tensor)
    return model
