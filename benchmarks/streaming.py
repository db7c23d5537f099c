"""Cut a checkpoint of Llama-3.1-8B's shape to the 4B width, file to file: memory, time, and the same bytes copied.

The checkpoint is random bf16, made on the spot (16 GB; 26 GB of disk in all). Copying reads all of the source and
writes as many bytes as the student has. The two take turns; each starts with the source dropped from the page cache
and ends with everything on the disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from measuring import memory_gib

from nemo_minitron.families import ModelShape, parameters, read_shape, tensor_shape
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.hf.checkpoint_writer import CheckpointWriter, Planned
from nemo_minitron.pruning.plan_file import PrunePlan
from nemo_minitron.pruning.slicing import prune_checkpoint
from nemo_minitron.system.progress import Progress

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
HIDDEN, FFN = 3072, 9216
CHUNK_BYTES = 16 * 2**20
GB = 1e9


def make_source(folder: Path, config: dict[str, object]) -> ModelShape:
    """Random tensors: slices of one random block at changing offsets, so that no two are alike."""
    folder.mkdir()
    shape = read_shape(config)
    block = torch.randn(2**25 + 2**20).bfloat16()
    rows = [(parameter.hf, tensor_shape(shape, parameter.row)) for parameter in parameters(shape)]
    writer = CheckpointWriter(folder, config, [Planned(name, dims, "BF16") for name, dims in rows])
    for number, (name, dims) in enumerate(rows):
        size, start = torch.Size(dims).numel(), number * 7919 % 2**20
        piece = block[start : start + 2**25]
        writer.add(name, piece.repeat(-(-size // piece.numel()))[:size].reshape(dims))
    writer.close()
    return shape


def random_plan(shape: ModelShape) -> PrunePlan:
    generator = torch.Generator().manual_seed(0)

    def some(size: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(size, generator=generator)[:count].tolist()))

    layers = tuple(range(shape.num_layers))
    return PrunePlan(
        method="random",
        layers=layers,
        shared={"hidden": some(shape.hidden_size, HIDDEN)},
        by_layer={
            "ffn": {layer: some(shape.ffn_hidden_size, FFN) for layer in layers},
            "groups": dict.fromkeys(layers, tuple(range(shape.num_query_groups))),
            "heads": dict.fromkeys(layers, tuple(range(shape.num_attention_heads))),
        },
    )


def prune(source: Path, out: Path) -> dict[str, float]:
    """In a process of its own: seconds, and peak memory with and without mapped file pages."""
    peak = [0.0]
    watcher = threading.Thread(target=_watch_anonymous, args=(peak,), daemon=True)
    watcher.start()
    plan = random_plan(Checkpoint.open(source).shape)
    started_s = time.perf_counter()
    prune_checkpoint(source, plan, out, Progress(silent=True))
    _to_disk(out)
    return {
        "wall_s": time.perf_counter() - started_s,
        "peak_rss_gib": memory_gib("VmHWM"),
        "peak_anonymous_gib": peak[0],
    }


def _watch_anonymous(peak: list[float]) -> None:
    while True:
        peak[0] = max(peak[0], memory_gib("RssAnon"))
        time.sleep(0.02)


def copy(source: Path, out: Path, num_bytes: int) -> dict[str, float]:
    """Read the whole source, write `num_bytes`."""
    started_s = time.perf_counter()
    left = num_bytes
    with (out / "copy").open("wb") as target:
        for file in sorted(source.glob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    target.write(chunk[:left])
                    left -= min(left, len(chunk))
    _to_disk(out)
    return {"wall_s": time.perf_counter() - started_s}


def _to_disk(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _drop_from_cache(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_child(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(scratch: Path, num_layers: int, rounds: int) -> dict[str, object]:
    source, out = scratch / "source", scratch / "out"
    config = {**CONFIG, "num_hidden_layers": num_layers}
    make_source(source, config)
    read_gb = sum(file.stat().st_size for file in source.glob("*.safetensors")) / GB
    pruned: list[dict[str, float]] = []
    copied: list[dict[str, float]] = []
    student_bytes = 0
    for _ in range(rounds):
        for call in ("prune", "copy"):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            _drop_from_cache(source)
            if call == "prune":
                pruned.append(_in_child(prune, source, out))
                student_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            else:
                copied.append(_in_child(copy, source, out, student_bytes))
    return _summary(pruned, copied, read_gb, student_bytes / GB)


def _summary(
    pruned: Sequence[dict[str, float]], copied: Sequence[dict[str, float]], read_gb: float, written_gb: float
) -> dict[str, object]:
    prune_s, copy_s = (median(run["wall_s"] for run in runs) for runs in (pruned, copied))
    return {
        "read_gb": read_gb,
        "written_gb": written_gb,
        "prune_s": [run["wall_s"] for run in pruned],
        "copy_s": [run["wall_s"] for run in copied],
        "prune_over_copy": prune_s / copy_s,
        "peak_rss_gib": max(run["peak_rss_gib"] for run in pruned),
        "peak_anonymous_gib": max(run["peak_anonymous_gib"] for run in pruned),
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        print(json.dumps(measure(Path(scratch), arguments.layers, arguments.rounds), indent=2))


if __name__ == "__main__":
    main()
