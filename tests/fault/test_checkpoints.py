"""Training checkpoints: kills, full disks and changed learning rates."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from nemo_minitron.artifacts.manifest import file_facts
from nemo_minitron.backends.megatron.distillation import distill
from nemo_minitron.backends.megatron.runtime import versions
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.backends.megatron.training import checkpoint
from nemo_minitron.backends.megatron.training import loop as training
from nemo_minitron.backends.megatron.training.checkpoint import Checkpoints, TrainingProgress, checkpoints, step_of
from nemo_minitron.backends.megatron.training.integrity import FACTS_FILE, find_damage, read_facts, write_facts
from nemo_minitron.errors import CheckpointError, NumericsError
from nemo_minitron.schema.execution import Execution, Parallel
from nemo_minitron.stages.common.training import loop_options
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.train.params import TrainStage
from nemo_minitron.system.files import sealed
from nemo_minitron.system.progress import Progress
from tests.support.distributed import run_ranks
from tests.support.live_bytes import LiveBytes
from tests.support.megatron_ranks import rows_until
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

PARAMS = TrainStage(
    kind="train",
    num_steps=12,
    global_batch_size=4,
    seq_len_tokens=32,
    lr=2e-3,
    precision="fp32",
    valid_num_tokens=128,
    save_interval_steps=3,
)
Folders = dict[str, Path]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    work = tmp_path / "work"
    work.mkdir()
    model = tiny_model_dir(tmp_path / "model", "llama_gqa_tied")
    return {"model": model, "data": tiny_data_dir(tmp_path / "data"), "work": work}


def _job(folders: Folders, session: Any, params: TrainStage = PARAMS) -> training.Job:
    return distill.prepare_training(params, folders["model"], folders["data"], folders["work"], session)


def _weights(job: training.Job) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in job.trainable.model.named_parameters()}


def _save_and_die(folders: Folders) -> None:
    """Write two checkpoints; the process is killed as soon as the second one has begun."""
    with open_session(Parallel(), device="cpu", threads=1) as session:
        job = _job(folders, session)
        kept = Checkpoints(folders["work"] / "checkpoints", session, keep=2, in_background=True)
        training.train_step(job, 0)
        kept.save(job.trainable, TrainingProgress(1))
        kept.finish()
        torch.save(_weights(job), folders["work"] / "expected.pt")
        training.train_step(job, 1)
        kept.save(job.trainable, TrainingProgress(2))
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_during_a_write_in_the_background_leaves_the_checkpoint_before(folders: Folders) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_save_and_die, args=(folders,))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    folder = folders["work"] / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["step_00000001"]
    assert list(folder.glob(".partial_*")), "the second one must have been begun for this to mean anything"
    with open_session(Parallel(), device="cpu", threads=1) as session:
        job = _job(folders, session)
        kept = Checkpoints(folder, session, keep=2, in_background=True)
        assert kept.resume(job.trainable).step == 1
        found = _weights(job)
    expected = torch.load(folders["work"] / "expected.pt", weights_only=True)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert not list(folder.glob(".partial_*"))


@pytest.mark.parametrize("in_background", [True, False])
def test_a_checkpoint_holds_the_state_of_its_own_step(in_background: bool, folders: Folders, tmp_path: Path) -> None:
    # Large enough that its second file is not begun when the weights change.
    large = tiny_model_dir(tmp_path / "large", "llama_gqa_tied", hidden_size=512, intermediate_size=1024)
    with open_session(Parallel(), device="cpu", threads=1) as session:
        job = _job({**folders, "model": large}, session)
        kept = Checkpoints(folders["work"] / "checkpoints", session, keep=1, in_background=in_background)
        for step in range(3):
            training.train_step(job, step)
            saved = _weights(job)
            kept.save(job.trainable, TrainingProgress(step + 1, (1.5, 0.1)))
            _change_weights(job)
            kept.finish()
        assert [path.name for path in checkpoints(kept.folder)] == ["step_00000003"]
        assert kept.resume(job.trainable) == TrainingProgress(3, (1.5, 0.1))
        assert all(torch.equal(weight, saved[name]) for name, weight in _weights(job).items())


@pytest.mark.skipif(versions._VERSION < (0, 12), reason="tensors are always copied to the host")
def test_a_save_in_the_background_copies_each_tensor_once(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def to_host(buckets: list[Any], *_: Any, **__: Any) -> list[Any]:
        """Copy every tensor, as Megatron does on a GPU."""
        return [
            (path, name, (blobs, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, name, (blobs, tensors) in buckets
        ]

    monkeypatch.setattr(filesystem_async.FileSystemWriterAsync, "preload_tensors", staticmethod(to_host))
    with open_session(Parallel(), device="cpu", threads=1) as session:
        job = _job(folders, session)
        training.train_step(job, 0)
        kept = Checkpoints(folders["work"] / "checkpoints", session, keep=1, in_background=True)
        peaks = []
        for step in range(1, 3):
            with LiveBytes() as live:
                kept.save(job.trainable, TrainingProgress(step))
            peaks.append(live.peak)
            kept.finish()
        assert kept._buffers is not None
        size = sum(buffer.nbytes for buffer in kept._buffers.values())
    print(f"state {size} B, peaks of two saves {peaks}")
    assert size > 12 * sum(weight.numel() for weight in _weights(job).values()) * 0.99
    # On the CPU Megatron copies the tensors that are parts of a larger one, here a third.
    assert peaks[0] < 1.4 * size, "the first save makes one copy"
    assert peaks[1] < 0.4 * size, "later saves use the same memory"


@torch.no_grad()
def _change_weights(job: training.Job) -> None:
    for weight in job.trainable.model.parameters():
        weight.mul_(2.0)


def _save_and_wait(kept: Checkpoints, job: training.Job) -> None:
    kept.save(job.trainable, TrainingProgress(2))
    kept.finish()


@pytest.mark.parametrize("in_background", [True, False])
def test_a_write_that_fails_is_a_users_error_and_keeps_the_checkpoint_before(
    in_background: bool, folders: Folders
) -> None:
    with open_session(Parallel(), device="cpu", threads=1) as session:
        job = _job(folders, session)
        kept = Checkpoints(folders["work"] / "checkpoints", session, keep=1, in_background=in_background)
        kept.save(job.trainable, TrainingProgress(1))
        kept.finish()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        try:
            with pytest.raises(CheckpointError, match="could not be written") as found:
                _save_and_wait(kept, job)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "File too large" in str(found.value)
        assert found.value.where == str(kept.folder)
        assert [path.name for path in checkpoints(kept.folder)] == ["step_00000001"]


def _error_of_a_disk_that_is_full_for_one(folders: Folders, full: int) -> str:
    with open_session(Parallel(pp=2), device="cpu", threads=1) as session:
        job = _job(folders, session)
        kept = Checkpoints(folders["work"] / "checkpoints", session, keep=1, in_background=True)
        if session.rank == full:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            _save_and_wait(kept, job)
        except CheckpointError as error:
            return str(error)
    return "none"


def test_a_write_that_fails_on_one_rank_ends_all_of_them(folders: Folders) -> None:
    other, own = run_ranks(2, _error_of_a_disk_that_is_full_for_one, folders, 1)
    assert "File too large" in own
    assert "could not be written: another process" in other
    assert checkpoints(folders["work"] / "checkpoints") == []


def _rates_after_resume(folders: Folders, parallel: Parallel, lr: float, num_steps: int) -> dict[int, float]:
    """Return step -> learning rate of a training that resumes in the work folder."""
    params = PARAMS.model_copy(update={"lr": lr, "min_lr": lr, "warmup_steps": 0, "num_steps": num_steps})
    with open_session(parallel, device="cpu", threads=1) as session:
        job = _job(folders, session, params)
        curves = training.run(job, folders["work"], Progress(silent=True))
    return {row["step"]: row["lr"] for row in curves.rows if "lr" in row}


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(dp=2)], ids=["one process", "dp2"])
def test_a_resumed_training_has_the_learning_rate_of_its_recipe(parallel: Parallel, folders: Folders) -> None:
    before = run_ranks(parallel.world_size, _rates_after_resume, folders, parallel, 2e-3, 3)[0]
    after = run_ranks(parallel.world_size, _rates_after_resume, folders, parallel, 5e-4, 6)[0]
    assert before == pytest.approx({1: 2e-3, 2: 2e-3, 3: 2e-3})
    assert after == pytest.approx({**before, 4: 5e-4, 5: 5e-4, 6: 5e-4})


def _reseal(checkpoint: Path, **other: Any) -> None:
    """Replace the facts of a checkpoint, with valid checksums."""
    facts = {**read_facts(checkpoint), **other}
    rest = [file for file in checkpoint.iterdir() if file.name != FACTS_FILE]
    facts["files"] = {file.name: found for file, found in file_facts(rest).items()}
    (checkpoint / FACTS_FILE).write_text(json.dumps(sealed(facts)))


def _half_trained(folders: Folders, parallel: Parallel) -> Path:
    """Keep the checkpoint of the third of six steps, and no later one."""
    run_ranks(parallel.world_size, _rates_after_resume, folders, parallel, 2e-3, 3)
    return checkpoints(folders["work"] / "checkpoints")[-1]


def _published(folders: Folders, num_steps: int) -> tuple[list[dict[str, float]], bytes]:
    """Train up to this step, publish, and return the curves without times, and the bytes of the weights."""
    (out := folders["work"] / f"published-{num_steps}").mkdir(parents=True)
    with open_session(Parallel(), device="cpu", threads=1) as session:
        job = _job(folders, session)
        rows = rows_until(job, folders["work"], num_steps)
        training.publish(job, folders["model"], folders["work"], out)
    return [row for row in rows if "train_loss" in row], (out / "model.safetensors").read_bytes()


def test_a_checkpoint_of_an_earlier_megatron_is_read(folders: Folders, tmp_path: Path) -> None:
    """Before 0.19, the state common to all ranks was in a separate file."""
    expected = _published({**folders, "work": tmp_path / "whole"}, 6)
    _published(folders, 3)
    newest = checkpoints(folders["work"] / "checkpoints")[-1]
    torch.save(dist_checkpointing.load_common_state_dict(str(newest)), newest / "common.pt")
    _reseal(newest)
    # Without the first rows, the curve shows that the training did not start again.
    (folders["work"] / "curves.jsonl").unlink()
    rows, weights = _published(folders, 6)
    assert rows == expected[0][3:]
    assert weights == expected[1]


def test_a_checkpoint_of_a_later_megatron_is_refused(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = _half_trained(folders, Parallel())
    if (newest / "common.pt").exists():
        (newest / "common.pt").unlink()
        _reseal(newest)
    else:
        monkeypatch.setattr(versions, "_VERSION", (0, 18))
    with (
        open_session(Parallel(), device="cpu", threads=1) as session,
        pytest.raises(CheckpointError, match=r"written by Megatron-Core 0\.19 or later") as found,
    ):
        training.run(_job(folders, session), folders["work"], Progress(silent=True))
    assert found.value.where == str(newest)
    assert "delete the checkpoints to start from the first step" in str(found.value)


def test_other_files_of_a_distributed_optimizer_are_refused(folders: Folders) -> None:
    """Megatron-Core 0.15 and later store whole tensors, earlier versions each rank's part of them."""
    spread = Parallel(distributed_optimizer=True)
    newest = _half_trained(folders, spread)
    _reseal(newest, whole_tensors=not read_facts(newest)["whole_tensors"])
    with pytest.raises(AssertionError, match=r"distributed optimizer was written by Megatron-Core 0\.1[45]"):
        run_ranks(1, _rates_after_resume, folders, spread, 2e-3, 6)


@pytest.mark.parametrize(
    ("keys", "after"),
    [
        (None, "There is no checkpoint yet, so the training starts again"),
        ("stages.shapes.retraining", "With --rerun changed, all trainings with these keys start again"),
    ],
)
def test_a_training_that_fails_names_its_stage_and_keys_as_the_recipe_does(
    keys: str | None, after: str, folders: Folders
) -> None:
    params = PARAMS.model_copy(update={"lr": 1e30})
    ctx = StageContext("healing", "r", folders["work"], folders["work"], Execution(), Progress(silent=True))
    where = re.escape(keys or "stages.healing")
    pattern = (
        rf"(?s)^healing: loss .* at step .* Lower {where}\.lr or raise {where}\.warmup_steps\. {after}.* {where}\.guard"
    )
    with (
        open_session(Parallel(), device="cpu", threads=1) as session,
        pytest.raises(NumericsError, match=pattern),
    ):
        training.run(_job(folders, session, params), folders["work"], ctx.progress, loop_options(ctx, keys))


def test_every_rank_resumes_from_the_checkpoint_that_the_first_one_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        (folder / FACTS_FILE).touch()
    session: Any = SimpleNamespace(is_main=False, barrier=lambda: None, gather=lambda own: [["step_00000002"], own])
    monkeypatch.setattr(checkpoint, "SaveStrategy", lambda: None)
    monkeypatch.setattr(checkpoint, "find_damage", lambda *_: None)
    monkeypatch.setattr(checkpoint, "_load", lambda _, folder: TrainingProgress(step_of(folder)))
    trainable: Any = None
    assert Checkpoints(tmp_path, session, keep=2, in_background=False).resume(trainable).step == 2


def test_a_checkpoint_that_one_rank_cannot_read_is_damaged_for_all(tmp_path: Path) -> None:
    (tmp_path / "a.distcp").write_bytes(b"weights")
    write_facts(tmp_path, {"step": 2}, {}, _beside([None, []]))
    assert find_damage(tmp_path, _beside([None, []])) is None
    assert (
        find_damage(tmp_path, _beside(["training.json: stale file handle", []])) == "training.json: stale file handle"
    )
    with pytest.raises(CheckpointError, match=r"no checksum of b\.distcp"):
        find_damage(tmp_path, _beside([None, ["b.distcp"]]))


def _beside(other: list[Any]) -> Any:
    """Return a session whose other rank sees these files of the checkpoint."""
    return SimpleNamespace(
        rank=0,
        world_size=1,
        device="cpu",
        is_main=True,
        barrier=lambda: None,
        sum=lambda tensor: tensor,
        gather=lambda own: [own, other],
    )


def test_a_checkpoint_is_not_blamed_for_missing_memory(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with open_session(Parallel(), device="cpu", threads=1) as session:
        job, folder = _job(folders, session), folders["work"] / "checkpoints"
        kept = Checkpoints(folder, session, keep=1, in_background=False)
        kept.save(job.trainable, TrainingProgress(1))
        monkeypatch.setattr(checkpoint, "load_checkpoint", fail)
        with pytest.raises(torch.OutOfMemoryError):
            kept.resume(job.trainable)
    assert len(checkpoints(folder)) == 1
