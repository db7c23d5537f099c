"""Damaged training checkpoints and index files are replaced by earlier or new ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.backends.megatron.data.datasets import training_samples
from nemo_minitron.backends.megatron.distillation import distill
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.backends.megatron.training import loop as training
from nemo_minitron.backends.megatron.training.checkpoint import checkpoints
from nemo_minitron.errors import CheckpointError
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.train.params import TrainStage
from nemo_minitron.system.progress import Progress
from tests.support.distributed import run_ranks
from tests.support.part_runs import cut, flip
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

PARAMS = TrainStage(
    kind="train",
    num_steps=6,
    global_batch_size=4,
    seq_len_tokens=32,
    lr=2e-3,
    precision="fp32",
    valid_num_tokens=128,
    save_interval_steps=2,
    keep_checkpoints=2,
)
Folders = dict[str, Path]
Rows = list[dict[str, Any]]


def _train(folders: Folders, work: Path, tp: int = 1) -> tuple[dict[str, torch.Tensor], Rows]:
    """Return (weights at the end, curves without times)."""
    work.mkdir(exist_ok=True)
    with open_session(Parallel(tp=tp), device="cpu", threads=1) as session:
        job = distill.prepare_training(PARAMS, folders["model"], folders["data"], work, session)
        curves = training.run(job, work, Progress(silent=not session.is_main))
        weights = {name: weight.detach().clone() for name, weight in job.trainable.model.named_parameters()}
    return weights, [{k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu")} for row in curves.rows]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return a model, its data, and the work folder of a training that has just ended."""
    root = tmp_path_factory.mktemp("trained")
    made = {"model": tiny_model_dir(root / "model", "llama_gqa_tied"), "data": tiny_data_dir(root / "data")}
    weights, rows = _train(made, root / "work")
    torch.save({"weights": weights, "rows": rows}, root / "expected.pt")
    return {**made, "work": root / "work", "expected": root / "expected.pt"}


def _copy_work(folders: Folders, tmp_path: Path) -> tuple[Path, Path]:
    """Return (work folder, its newest checkpoint)."""
    work = tmp_path / "work"
    shutil.copytree(folders["work"], work)
    found = checkpoints(work / "checkpoints")
    assert [path.name for path in found] == ["step_00000004", "step_00000006"]
    return work, found[-1]


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [("*.distcp", flip), ("*.distcp", cut), (".metadata", flip), ("common.pt", flip), ("training.json", flip),
     ("training.json", cut), ("*.distcp", Path.unlink)],
)  # fmt: skip
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    pattern: str,
    damage: Callable[[Path], None],
    folders: Folders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work, newest = _copy_work(folders, tmp_path)
    found = sorted(newest.glob(pattern))
    if pattern == "common.pt" and not found:
        pytest.skip("since Megatron-Core 0.19 the .distcp files hold what it held")
    file = found[-1]
    damage(file)
    weights, rows = _train(folders, work)
    message = " ".join(capsys.readouterr().err.split())
    assert f"training: step_00000006 is damaged ({file.name}" in message
    assert "resuming from step_00000004" in message
    assert "training 4/6" in message
    expected = torch.load(folders["expected"], weights_only=True)
    assert weights.keys() == expected["weights"].keys()
    assert all(torch.equal(weight, expected["weights"][name]) for name, weight in weights.items())
    assert rows == expected["rows"]
    assert [path.name for path in checkpoints(work / "checkpoints")] == ["step_00000004", "step_00000006"]
    assert (work / "checkpoints/damaged_step_00000006").is_dir()


def test_the_only_checkpoint_is_not_deleted(folders: Folders, tmp_path: Path) -> None:
    work, newest = _copy_work(folders, tmp_path)
    shutil.rmtree(checkpoints(work / "checkpoints")[0])
    flip(next(newest.glob("*.distcp")))
    with pytest.raises(CheckpointError, match="The only training checkpoint is damaged") as caught:
        _train(folders, work)
    assert caught.value.where == str(newest)
    assert "starts the training from its first step" in str(caught.value)
    assert checkpoints(work / "checkpoints") == [newest]
    shutil.rmtree(newest)
    weights, _ = _train(folders, work)
    expected = torch.load(folders["expected"], weights_only=True)["weights"]
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_a_checkpoint_without_checksums_is_used_only_if_the_user_trusts_it(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, newest = _copy_work(folders, tmp_path)
    (newest / "training.json").write_text('{"step": 6, "good_losses": [], "distributed_optimizer": false}')
    with pytest.raises(CheckpointError, match=r"has no checksum of training\.json") as caught:
        _train(folders, work)
    assert f"MINITRON_TRUSTED_FOLDERS={newest}" in str(caught.value)
    monkeypatch.setenv("MINITRON_TRUSTED_FOLDERS", str(newest))
    _train(folders, work)
    assert not list((work / "checkpoints").glob("damaged_*"))


def _train_in_numbers(folders: Folders, work: Path, tp: int) -> tuple[dict[str, list[Any]], Rows]:
    """A tensor would not survive the process that made it."""
    weights, rows = _train(folders, work, tp)
    return {name: weight.tolist() for name, weight in weights.items()}, rows


@pytest.mark.slow
def test_all_ranks_agree_that_a_checkpoint_is_damaged(folders: Folders, tmp_path: Path) -> None:
    """The part of rank 1 is damaged: all ranks use the previous checkpoint, and end with the same bits."""
    work = tmp_path / "work"
    first = run_ranks(2, _train_in_numbers, folders, work, 2)
    newest = checkpoints(work / "checkpoints")[-1]
    assert not list(newest.glob("written_*"))
    flip(sorted(newest.glob("__1_*.distcp"))[0])
    assert run_ranks(2, _train_in_numbers, folders, work, 2) == first
    assert (work / "checkpoints/damaged_step_00000006").is_dir()


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_index_is_made_again(damage: Callable[[Path], None], folders: Folders, tmp_path: Path) -> None:
    def first_tokens() -> list[torch.Tensor]:
        samples = training_samples(
            folders["data"], num_samples=24, seq_len_tokens=32, seed=3, cache_dir=tmp_path / "index"
        )
        return [torch.as_tensor(samples[number]["tokens"]) for number in range(24)]

    expected = first_tokens()
    for file in sorted((tmp_path / "index").iterdir()):
        damage(file)
        found = first_tokens()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), file.name
