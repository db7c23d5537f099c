"""Files that are deleted or changed after a run has begun and before they are read."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import TOY, Cli
from tests.support.part_runs import computed, copy_before
from tests.support.tiny_models import tiny_model_dir

LINE = json.dumps({"text": "The hound went over the moor, and what it saw there nobody knows. " * 40}) + "\n"
LONG = 700
"""Number of lines that takes long enough for a change in the meantime."""


def _remove_after_a_stage(path: Path) -> str:
    """Return an override with a notify command, which runs after each stage, that removes the path."""
    return f"execution.notify_command=[rm,-rf,'{path}']"


def _require_one_message(code: int, output: str, *message: str) -> None:
    assert code == 2, output
    assert output.count("error:") == 1
    assert "Traceback" not in output
    flat = " ".join(output.split())
    for words in message:
        assert words in flat


@contextmanager
def _while_it_is_read(run: Path, disturb: Callable[[], object]) -> Iterator[list[bool]]:
    """Call a function when the data stage has written its first tokens; yield a list that then holds True."""
    done: list[bool] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and not any(file.stat().st_size for file in run.glob(".work/data/shards/*.ids")):
            time.sleep(0.002)
        if not over.is_set():
            disturb()
            done.append(True)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def _text(folder: Path, *names: str) -> str:
    """Write files of rows, and return the override that names their folder."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(LINE * LONG)
    return f"stages.data.sources=[{{source: '{folder}'}}]"


def test_a_text_that_is_deleted_before_it_is_read(minitron: Cli, tmp_path: Path) -> None:
    text = tmp_path / "text"
    command = ("run", TOY, f"execution.run_root={tmp_path}", _text(text, "a.jsonl"), "--until", "data")
    code, output = minitron(*command, _remove_after_a_stage(text))
    _require_one_message(code, output, f"There is no text at {text}.", "Check the path")
    assert (tmp_path / "toy/width/teacher").is_dir(), "finished stages must be kept"
    code, output = minitron(*command)
    _require_one_message(code, output, "stages.data.sources.0", str(text))
    (tmp_path / "again").mkdir()
    text.mkdir()
    (text / "a.jsonl").write_text(LINE * 50)
    code, output = minitron(*command)
    assert code == 0, output


@pytest.mark.parametrize("what", ["grows", "goes", "another goes"])
def test_a_text_that_changes_while_it_is_read(what: str, minitron: Cli, tmp_path: Path) -> None:
    text, run = tmp_path / "text", tmp_path / "toy/width"
    command = ("run", TOY, f"execution.run_root={tmp_path}", _text(text, "a.jsonl", "b.jsonl"), "--until", "data")
    assert minitron(*command[:-1], "teacher")[0] == 0

    def disturb() -> None:
        if what == "grows":
            with (text / "b.jsonl").open("a") as file:
                file.write(LINE)
        else:
            (text / ("a.jsonl" if what == "goes" else "b.jsonl")).unlink()

    with _while_it_is_read(run, disturb) as done:
        code, output = minitron(*command)
    assert done, "otherwise the test would pass without any change"
    message = {
        "grows": (f"a source has changed since the run began. where: {text}", "wait until nothing writes to it"),
        "goes": (str(text),),
        "another goes": ("b.jsonl", "If it was moved or deleted, put it back"),
    }
    _require_one_message(code, output, *message[what])
    assert not (run / "data").exists()
    assert not list(run.glob(".partial-*"))
    code, output = minitron(*command)
    assert code == 0, output
    source = json.loads((run / "data/manifest.json").read_text())["payload"]["sources"][str(text)]
    assert source["bytes"] == sum(file.stat().st_size for file in text.iterdir())


def test_a_deleted_artifact_is_made_again(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    run = copy_before(toy_run, tmp_path, "score")
    command = ("run", TOY, f"execution.run_root={tmp_path}", "--until", "select")
    code, output = minitron(*command, _remove_after_a_stage(run / "score"))
    _require_one_message(
        code, output, "Stage score has not finished, or its folder is gone.", str(run / "score"), "run the same command"
    )
    code, output = minitron(*command)
    assert code == 0, output
    assert computed(run / "select") == computed(toy_run / "toy/width/select")


def test_the_error_names_a_deleted_file_of_an_artifact(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    run = copy_before(toy_run, tmp_path, "score")
    (run / "data/train_00.idx").unlink()
    code, output = minitron("run", TOY, f"execution.run_root={tmp_path}", "--until", "score")
    _require_one_message(code, output, "train_00.idx of stage data is missing.", "--rerun data")


def test_the_error_names_a_deleted_shard_of_a_model(minitron: Cli, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from nemo_minitron.hf.checkpoint import CheckpointWriter, read_config

    whole = tiny_model_dir(tmp_path / "whole", "llama_gqa_tied", intermediate_size=192)
    model = tmp_path / "model"
    shutil.copytree(whole, model, ignore=shutil.ignore_patterns("*.safetensors"))
    writer = CheckpointWriter(model, read_config(whole), dtype=torch.float32, max_shard_bytes=100_000)
    for name, tensor in load_file(whole / "model.safetensors").items():
        writer.add(name, tensor)
    writer.close()
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 1
    command = ("run", TOY, f"execution.run_root={tmp_path}", f"stages.teacher.source={model}", "--until", "teacher")
    shards[1].rename(tmp_path / "elsewhere")
    code, output = minitron(*command)
    _require_one_message(code, output, f"Shard {shards[1].name} is missing.", str(model), "Complete the download")
    (tmp_path / "elsewhere").rename(shards[1])
    assert minitron(*command)[0] == 0


def test_a_finished_run_does_not_need_its_text(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(LINE * 50)
    command = ("run", TOY, f"execution.run_root={tmp_path}", f"stages.data.sources=[{{source: '{text}'}}]", "--until")
    assert minitron(*command, "data")[0] == 0
    text.unlink()
    code, output = minitron(*command, "check_teacher", "stages.check_teacher.max_loss=99")
    assert code == 0, output
