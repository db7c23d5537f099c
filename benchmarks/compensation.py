"""What the repair of a pruned model costs, against a plain forward pass over the same tokens, in time and memory.

`--shape demo` repairs SmolLM2-135M whole. `--shape 8b` takes a few layers of Llama-3.1-8B's width with random weights,
and states what all 32 layers would take: every layer costs the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import memory_gib
from safetensors.torch import save_file

from nemo_minitron.backends.megatron.compensation.repair import LayerRepair, Models, repaired_layers
from nemo_minitron.backends.megatron.compensation.streams import MicroBatch, Stream, embedded
from nemo_minitron.backends.megatron.model.build import DTYPES
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.families import parameters, tensor_shape
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.plan_file import read_plan, write_plan
from nemo_minitron.pruning.selection import choose_keep
from nemo_minitron.pruning.slicing import prune_checkpoint
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.pruning import Compensation, Selection, Target
from nemo_minitron.system.progress import Progress

LAYERS_OF_8B = 32
SHAPES: dict[str, dict[str, Any]] = {
    "demo": {
        "config": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
        "target": Target(ffn_hidden_size=752),
        "num_layers": 30,
    },
    "8b": {
        "config": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "target": Target(hidden_size=3072, ffn_hidden_size=9216),
        "num_layers": 2,
    },
}


def make_models(root: Path, name: str) -> Models:
    """Write a teacher with random bf16 weights, and its student; the vocabulary is small."""
    shape = SHAPES[name]
    teacher = root / "teacher"
    teacher.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 1024,
        "num_hidden_layers": shape["num_layers"],
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **shape["config"],
    }
    (teacher / "config.json").write_text(json.dumps(config))
    from nemo_minitron.families import read_shape

    source = read_shape(config, where="benchmark")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for parameter in parameters(source):
        dims = tensor_shape(source, parameter.row)
        scale = dims[-1] ** -0.5 if len(dims) > 1 else 1.0
        tensors[parameter.hf] = (torch.randn(dims, generator=generator) * scale).bfloat16()
    save_file(tensors, str(teacher / "model.safetensors"))
    plan = choose_keep({}, source, Selection(method="random", target=shape["target"]))
    for folder in ("student", "plan"):
        (root / folder).mkdir()
    write_plan(plan, source, root / "plan")
    prune_checkpoint(teacher, plan, root / "student", Progress(silent=True))
    return open_models(root)


def open_models(root: Path) -> Models:
    teacher = Checkpoint.open(root / "teacher")
    return Models(teacher, Checkpoint.open(root / "student"), read_plan(root / "plan", teacher.shape))


def streams_of(models: Models, params: Compensation) -> list[Stream]:
    generator = torch.Generator().manual_seed(1)
    count = params.num_samples + params.heldout_tokens // params.seq_len_tokens
    rows = torch.randint(0, 1024, (count, params.seq_len_tokens), generator=generator)
    batches = [
        MicroBatch(part, torch.ones_like(part, dtype=torch.bool), number * 4 >= params.num_samples)
        for number, part in enumerate(rows.split(4))
    ]
    embeddings = (models.teacher.embeddings(), models.student.embeddings())
    return embedded(batches, *embeddings, DTYPES[params.precision])


def measure(root: Path, params: Compensation, threads: int, *, forward_only: bool) -> dict[str, float]:
    """Return seconds and peak memory of a repair, or of the teacher's forward pass over the same text."""
    with open_session(Parallel(micro_batch_size=4), device="cpu", threads=threads) as session:
        models = open_models(root)
        repair, streams = LayerRepair(models, params, session), streams_of(models, params)
        started_s = time.monotonic()
        if forward_only:
            for layer in range(models.source.num_layers):
                repair.teacher.load(layer, lambda parameter: models.teacher.read(parameter.hf))
                for stream in streams:
                    stream.teacher = repair.teacher.forward(stream.teacher).cpu()
        else:
            for _ in repaired_layers(repair, streams, {}):
                pass
        seconds = time.monotonic() - started_s
    return {"seconds": seconds, "peak_gib": memory_gib("VmHWM")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--mode", choices=("one_shot", "sequential"), default="one_shot")
    parser.add_argument("--samples", type=int, default=128, help="samples of 256 tokens")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    params = Compensation(
        mode=options.mode,
        num_samples=options.samples,
        seq_len_tokens=256,
        heldout_tokens=options.samples * 64,
        precision=options.precision,
    )
    found: dict[str, Any] = {"shape": options.shape, "mode": options.mode, "tokens": options.samples * 320}
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), options.shape)
        for name, forward_only in (("forward", True), ("repair", False)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[name] = pool.apply(
                    measure, (Path(folder), params, options.threads), {"forward_only": forward_only}
                )
    found["over_forward"] = {key: found["repair"][key] / found["forward"][key] for key in ("seconds", "peak_gib")}
    layers = SHAPES[options.shape]["num_layers"]
    found["seconds_per_layer"] = found["repair"]["seconds"] / layers
    if options.shape == "8b":
        found["seconds_of_32_layers"] = found["seconds_per_layer"] * LAYERS_OF_8B
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
