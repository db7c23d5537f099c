"""Documents per second of the `tokenize` stage, killed on the way or not, and that the bytes are always the same.

    python benchmarks/tokenizing.py --mb 2000 --kills 3 --base ../older-checkout

Makes text of the passages in assets/ (or of the toy text), runs the stage through the command line with all cores,
kills it with SIGKILL when a share of its shards is there, and lets it go on. A second run has one process and no kill.
With --base, an older checkout tokenizes the same text, for at most --base-s seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import zstandard

from nemo_minitron.data.blocks import read_blocks
from nemo_minitron.hf.source import BUILT_IN
from nemo_minitron.system.cores import usable_cores

REPO = Path(__file__).resolve().parents[1]
PASSAGES = Path("benchmark-train-passages") / "passages.jsonl"
FILES = 16
POLL_S = 0.2


def make_text(folder: Path, assets_dir: Path, num_bytes: int) -> None:
    """Files of .jsonl and .jsonl.zst; each document is a few passages and a word that stands nowhere else."""
    passages = assets_dir / PASSAGES
    data = b"".join(block.data for block in read_blocks(passages if passages.is_file() else BUILT_IN["toy-text"]))
    texts = [json.loads(line)["text"] for line in data.splitlines()]
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(FILES):
        rows, size = [], 0
        while size < num_bytes // FILES:
            words = "".join(draw.choices("etaoinshr", k=8))
            rows.append(json.dumps({"text": " ".join([*draw.choices(texts, k=draw.randint(1, 6)), words])}))
            size += len(rows[-1]) + 1
        content = ("\n".join(rows) + "\n").encode()
        if number % 2:
            (folder / f"{number:02d}.jsonl").write_bytes(content)
        else:
            (folder / f"{number:02d}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(content))


class Run:
    """A recipe of two stages in a folder of its own."""

    def __init__(
        self, scratch: Path, name: str, arguments: argparse.Namespace, *, checkout: Path = REPO, workers: int
    ) -> None:
        self.folder, self.checkout = scratch / "runs" / name, checkout
        assets_dir, teacher = arguments.assets_dir.resolve(), arguments.teacher
        text = scratch / "text" if arguments.text is None else arguments.text.resolve()
        self.recipe = scratch / f"{name}.yaml"
        execution = {"device": "cpu", "run_root": str(scratch / "runs"), "assets_dir": str(assets_dir)}
        stages = {
            "teacher": {"kind": "import", "source": teacher},
            "data": {"kind": "tokenize", "sources": [{"source": str(text)}]},
        }
        content = {"stages": stages, "execution": {**execution, "workers": workers}}
        self.recipe.write_text(json.dumps({"defaults": ["_self_"], **content}))
        subprocess.run(self.command("--until", "teacher"), env=self.environment, check=True, capture_output=True)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": "1"}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "nemo_minitron", "run", str(self.recipe), *words]

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen(self.command(), env=self.environment, stdout=out, stderr=subprocess.STDOUT)

    def shards(self) -> set[tuple[str, int]]:
        """(name, when it was made) of each finished shard."""
        found = (self.folder / ".work" / "data" / "shards").glob("*.shard.json")
        return {(file.name, file.stat().st_mtime_ns) for file in found}

    def facts(self) -> dict[str, object]:
        facts = json.loads((self.folder / "data" / "data.json").read_text())
        digest = hashlib.sha256()
        for file in sorted((self.folder / "data").glob("*_00.*")):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        documents = sum(facts[split][0]["num_documents"] for split in ("train", "valid"))
        return {"documents": documents, "sha256": digest.hexdigest()}


def tokenize(run: Run, log: Path, kills: int) -> dict[str, object]:
    """The whole stage; killed when 1/(kills + 1), 2/(kills + 1), ... of the shards are there."""
    wall_s, kept, made_again = 0.0, set[tuple[str, int]](), 0
    starts = []
    for number in range(kills + 1):
        started = time.monotonic()
        process = run.start(log)
        while process.poll() is None:
            time.sleep(POLL_S)
            now = run.shards()
            if number < kills and now and len(now) >= (number + 1) * _num_shards(log) / (kills + 1):
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                break
        wall_s += time.monotonic() - started
        if number < kills:
            now = run.shards()
            made_again += len(kept - now)
            starts.append(len(now - kept))
            kept = now
    if process.returncode != 0:
        raise SystemExit(log.read_text())
    return {
        "wall_s": wall_s,
        "shards_before_each_kill": starts,
        "finished_shards_made_again": made_again,
        **run.facts(),
    }


def _num_shards(log: Path) -> int:
    found = re.search(r"(\d+) shards", log.read_text(errors="replace"))
    return int(found[1]) if found else sys.maxsize


def base_speed(run: Run, log: Path, most_s: float) -> dict[str, object]:
    """Documents per second by what the older version prints, from its first line with documents to its last."""
    process = run.start(log)
    seen: list[tuple[float, int]] = []
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < most_s:
        time.sleep(POLL_S)
        counts = re.findall(r"documents (\d+)", log.read_text(errors="replace"))
        if counts and (not seen or int(counts[-1]) != seen[-1][1]):
            seen.append((time.monotonic(), int(counts[-1])))
    finished = process.poll() is not None
    process.terminate()
    process.wait()
    (first_s, first), (last_s, last) = seen[0], seen[-1]
    return {"documents_per_s": (last - first) / (last_s - first_s), **(run.facts() if finished else {})}


def measure(arguments: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, object]]:
    cores = usable_cores()
    if arguments.text is None:
        make_text(scratch / "text", arguments.assets_dir, arguments.mb * 10**6)
    yield "cores", cores
    run = Run(scratch, "shards", arguments, workers=cores)
    found = tokenize(run, scratch / "shards.log", arguments.kills)
    speed = int(str(found["documents"])) / float(str(found["wall_s"]))
    yield "shards", {**found, "documents_per_s": speed}
    shutil.rmtree(run.folder)
    if arguments.base is not None:
        older = Run(scratch, "base", arguments, checkout=arguments.base.resolve(), workers=cores)
        base = base_speed(older, scratch / "base.log", arguments.base_s)
        yield "base", base
        yield "ratio", speed / float(str(base["documents_per_s"]))
    if not arguments.fast:
        alone = tokenize(Run(scratch, "alone", arguments, workers=1), scratch / "alone.log", kills=0)
        yield "one_process", alone
        yield "same_bytes", alone["sha256"] == found["sha256"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--text", type=Path, help="a folder of text to use instead of making some")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--teacher", default="asset:toy-llama", help="whose tokenizer")
    parser.add_argument("--assets-dir", type=Path, default=Path("assets"))
    parser.add_argument("--base", type=Path, help="an older checkout")
    parser.add_argument("--base-s", type=float, default=120.0)
    parser.add_argument("--fast", action="store_true", help="without the run of one process")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to use")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for name, value in measure(arguments, Path(scratch)):
            print(json.dumps({name: value}), flush=True)


if __name__ == "__main__":
    main()
