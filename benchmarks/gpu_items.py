"""Items of gpu_check.py that compare a GPU with the CPU, layers with each other, and memory with the plan."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from nemo_minitron.backends.megatron.model import layers
from nemo_minitron.backends.megatron.runtime.peak import matmul_flops_per_s
from nemo_minitron.families import read_shape
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.score.params import ScoreStage
from nemo_minitron.workload.memory import memory_of
from nemo_minitron.workload.work import Work
from tests.support.gpu import distill_peak_bytes
from tests.support.megatron_ranks import distill_losses, distill_until, logits_of, scores_of
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_distill import TWENTY_STEPS, distill_folders
from tests.support.tiny_models import FAMILY_CASES, load_transformers, tiny_model_dir

WHOLE = Parallel(micro_batch_size=4)
BF16 = TWENTY_STEPS.model_copy(update={"precision": "bf16"})
TOKENS = torch.randint(0, 400, (2, 64), generator=torch.Generator().manual_seed(1)).tolist()
TORCH, ENGINE = "torch", "transformer_engine"
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "flash-attn", "numpy")
REFERENCE_WAIT_S = 40.0


class Skipped(Exception):
    """An item cannot run: there is no time, or it lacks what another item makes."""


@dataclass
class Context:
    """What the items share."""

    root: Path
    on_gpu: bool
    kept: dict[str, Any] = field(default_factory=dict)
    child: subprocess.Popen[bytes] | None = None

    @property
    def device(self) -> str:
        return "cuda" if self.on_gpu else "cpu"

    @property
    def layers(self) -> list[str]:
        return [TORCH, ENGINE] if self.on_gpu and layers.has_transformer_engine() else [TORCH]

    def folder(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True)
        return path

    def folders(self) -> dict[str, Path]:
        if "folders" not in self.kept:
            self.kept["folders"] = distill_folders(self.folder("tiny"))
        return self.kept["folders"]

    def work(self, name: str) -> tuple[Path, Path, Path, Path]:
        folders = self.folders()
        return folders["student"], folders["teacher"], folders["data"], self.folder(f"work/{name}")

    def start_reference(self) -> None:
        """Start the runs on the CPU that a GPU is compared with; the models exist before both use them."""
        student, teacher, data, _ = (str(path) for path in self.work("unused"))
        command = [sys.executable, __file__, student, teacher, data, str(self.folder("reference"))]
        # Its session is on the CPU, but it sees the GPU and the engine, as users' CPU sessions do.
        environment = {**os.environ, "OMP_NUM_THREADS": "4", "PYTHONPATH": os.pathsep.join(sys.path)}
        with (self.root / "reference.log").open("wb") as log:
            self.child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def reference(self, name: str) -> Any:
        """Return the result of a run on the CPU; wait for it."""
        file, until = self.root / "reference" / f"{name}.json", time.monotonic() + REFERENCE_WAIT_S
        while not file.exists():
            if time.monotonic() > until or (self.child and self.child.poll() not in (None, 0)):
                raise RuntimeError(f"no reference {name}: {(self.root / 'reference.log').read_text()[-2000:]}")
            time.sleep(0.2)
        return json.loads(file.read_text())

    def close(self) -> None:
        if self.child is not None and self.child.poll() is None:
            self.child.kill()
            self.child.wait()


def with_layers(kind: str) -> Any:
    return nullcontext() if kind == ENGINE else patch.object(layers, "has_transformer_engine", lambda: False)


def within(bound: float, distances: Mapping[str, float]) -> dict[str, Any]:
    """Return the distances and whether all are within the bound; NaN is not."""
    return {**distances, "bound": bound, "passes": all(distance <= bound for distance in distances.values())}


def free_memory() -> None:
    """Return what is no longer used to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def facts(context: Context) -> dict[str, Any]:
    """Versions, whether the engine is usable, peak of matrix products, rate of copies to pinned memory."""
    found: dict[str, Any] = {"python": platform.python_version(), "layers": context.layers}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    device = torch.device(context.device)
    found["matmul_tflops_per_s"] = matmul_flops_per_s(torch.bfloat16, device) / 1e12
    if not context.on_gpu:
        return found
    found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "nccl": torch.cuda.nccl.version()}
    found["environment"] = {k: v for k, v in os.environ.items() if k.startswith(("NVTE", "NCCL", "CUDA", "PYTORCH"))}
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    pinned = torch.empty(source.shape, pin_memory=True)
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        pinned.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        found["to_pinned_gb_per_s"] = source.nbytes / (time.perf_counter() - started) / 1e9
    return found


def logits(context: Context) -> dict[str, Any]:
    """Distance of each family's logits from transformers: the distances, not only whether they pass."""
    models = {case: tiny_model_dir(context.folder(f"logits/{case}"), case) for case in FAMILY_CASES}
    expected = {}
    for case, path in models.items():
        with torch.no_grad():
            expected[case] = load_transformers(path)(torch.tensor(TOKENS)).logits.numpy()
    out: dict[str, Any] = {}
    for kind, precision, bound in ((TORCH, "fp32", 1e-4), (TORCH, "bf16", 0.03), (ENGINE, "bf16", 0.03)):
        if kind not in context.layers:
            continue
        with with_layers(kind):
            paths: list[tuple[Path, Path | None]] = [(path, None) for path in models.values()]
            found = logits_of(paths, Parallel(), TOKENS, context.device, precision)
        distances = {
            case: float(np.linalg.norm(one - expected[case]) / np.linalg.norm(expected[case]))
            for case, one in zip(models, found, strict=True)
            if one is not None
        }
        out[f"{kind} {precision}"] = within(bound, distances)
    return out


def bf16_losses(context: Context) -> dict[str, Any]:
    """Twenty steps in bf16 with each kind of layers and recomputation, against one of them."""
    with with_layers(TORCH):
        train, _ = distill_losses(BF16, WHOLE, *context.work("bf16"), context.device)
    distances = {}
    for kind in context.layers:
        for recompute in ("none", "selective", "full"):
            if (kind, recompute) == (TORCH, "none"):
                continue
            layout = WHOLE.model_copy(update={"recompute": recompute})
            with with_layers(kind):
                found, _ = distill_losses(BF16, layout, *context.work(f"bf16-{kind}-{recompute}"), context.device)
            distances[f"{kind} {recompute}"] = float(np.abs(np.array(found) - train).max())
    return {"first": train[0], "last": train[-1], **within(0.05, distances)}


def resume(context: Context) -> dict[str, Any]:
    """Largest difference of the losses of 20 steps in one go, and of 7 + 13."""
    distances = {}
    for kind in context.layers:
        for distributed in (False, True):
            layout, name = WHOLE.model_copy(update={"distributed_optimizer": distributed}), f"{kind}-{distributed}"
            with with_layers(kind):
                whole = distill_until(BF16, layout, *context.work(f"whole-{name}"), 20, context.device)
                parts = context.work(f"parts-{name}")
                distill_until(BF16, layout, *parts, 7, context.device)
                found = distill_until(BF16, layout, *parts, 20, context.device)
            case = f"{kind} {'distributed' if distributed else 'plain'}"
            distances[case] = float(np.abs(np.array(found) - whole).max())
    return within(0.01, distances)


def cpu_references(context: Context) -> dict[str, Any]:
    """Twenty steps and scores in fp32 against those of the CPU; distances of scores are relative."""
    with with_layers(TORCH):
        train, valid = distill_losses(TWENTY_STEPS, WHOLE, *context.work("fp32"), context.device)
    expected_train, expected_valid = context.reference("losses")
    losses = {
        "train": float(np.abs(np.array(train) - expected_train).max()),
        "valid": float(np.abs(np.array(valid) - expected_valid).max()),
    }
    out = {"losses": within(1e-3, losses)}
    _, teacher, data, _ = context.work("scores")
    for method in ("activation", "taylor"):
        with with_layers(TORCH):
            scores = _scores(method, teacher, data, context.folder(f"scores/{method}"), context.device)
        expected = context.reference(method)
        distances = {
            name: float((np.abs(np.array(score) - expected[name]) / (np.abs(np.array(expected[name])) + 1e-3)).max())
            for name, score in scores.items()
        }
        out[method] = within(1e-3, distances)
    return out


def _scores(method: str, teacher: Path, data: Path, work: Path, device: str) -> dict[str, list[Any]]:
    keys = {"kind": "score", "num_samples": 8, "seq_len_tokens": 32, "method": method}
    stage = ScoreStage.model_validate({**keys, "layer_metrics": ("block_influence", "lm_loss")})
    (found,) = scores_of({"teacher": teacher}, data, WHOLE, work, {"case": ("fp32", stage)}, device).values()
    return {name: score.tolist() for name, score in found.items()}


def memory(context: Context) -> dict[str, Any]:
    """Measured and planned memory of four trainings, in bytes; on a CPU the plan only."""
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 4096}
    sizes |= {"hidden_size": 1024, "intermediate_size": 2816}
    seq = 2048
    if not context.on_gpu:
        sizes, seq = {}, 64
    models = {
        name: tiny_model_dir(
            context.folder(f"memory/{name}"), "llama31_rope", dtype=torch.bfloat16, num_hidden_layers=count, **sizes
        )
        for name, count in {"student": 12, "teacher": 16}.items()
    }
    data = tiny_data_dir(context.folder("memory/data"), num_documents=400)
    params = {"kind": "distill", "num_steps": 4, "lr": 1e-4, "global_batch_size": 2, "seq_len_tokens": seq}
    params |= {"precision": "bf16", "valid_num_tokens": seq}
    shapes = {name: read_shape(json.loads((p / "config.json").read_text()), where=name) for name, p in models.items()}
    out: dict[str, Any] = {}
    for kind in context.layers:
        for recompute in ("none", "full"):
            parallel: dict[str, Any] = {"micro_batch_size": 2, "recompute": recompute}
            work = Work(
                shapes["student"],
                Parallel(**parallel),
                "bf16",
                seq,
                teacher=shapes["teacher"],
                lone_forward_kl=True,
                on_gpu=context.on_gpu,
            )
            planned = memory_of(work)
            free_memory()  # The cases before would count as reserved.
            one: dict[str, Any] = {"planned_fixed": planned.fixed, "planned_peak": planned.peak}
            if context.on_gpu:
                order = {"params": params, "parallel": parallel, "data": data, **models}
                with with_layers(kind):
                    one |= distill_peak_bytes({**order, "work": context.folder(f"memory/{kind}-{recompute}")})
                one["reserved"] = torch.cuda.max_memory_reserved()
                one["fixed_ratio"] = one["fixed"] / planned.fixed
                one["peak_ratio"] = one["peak"] / planned.peak
            out[f"{kind} {recompute}"] = one
    return out


def _reference(student: Path, teacher: Path, data: Path, out: Path) -> None:
    """Run the trainings on the CPU that the GPU is compared with; a process of its own calls this."""

    def write(name: str, value: Any) -> None:
        partial = out / f".{name}"
        partial.write_text(json.dumps(value))
        partial.rename(out / f"{name}.json")

    (out / "work").mkdir()
    write("losses", distill_losses(TWENTY_STEPS, WHOLE, student, teacher, data, out / "work", "cpu"))
    for method in ("activation", "taylor"):
        (out / method).mkdir()
        write(method, _scores(method, teacher, data, out / method, "cpu"))


ITEMS: list[tuple[str, float, Callable[[Any], dict[str, Any]]]] = [
    ("facts", 15, facts),
    ("logits", 20, logits),
    ("bf16_losses", 25, bf16_losses),
    ("resume", 30, resume),
    ("cpu_references", 15, cpu_references),
    ("memory", 30, memory),
]

if __name__ == "__main__":
    _reference(*(Path(argument) for argument in sys.argv[1:5]))
