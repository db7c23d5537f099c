"""Short ways into NeMo-Aligner's environment."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.backends.aligner import convert
from nemo_minitron.backends.aligner.config import TRAINER_KEYS, Method, complete_config
from nemo_minitron.backends.aligner.process import run_task
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.interrupts import StopRequest
from nemo_minitron.progress import Progress


@dataclass
class Border:
    """A model on the other side."""

    model: Path
    work: Path
    seq_len_tokens: int = 128
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def nemo(self) -> Path:
        return self.work / "nemo"

    def cross(self) -> Border:
        """Hugging Face -> NeMo."""
        options: dict[str, Any] = {"seq_len_tokens": self.seq_len_tokens, "on_cpu": True}
        self.config = convert.to_nemo(self.model, self.nemo, self.work / "border", self.log, *quiet(), **options)
        return self

    def back(self, out: Path, nemo: Path | None = None) -> Path:
        """NeMo -> Hugging Face."""
        out.mkdir(parents=True)
        convert.from_nemo(nemo or self.nemo, self.config, self.model, out, self.work / "border", self.log, *quiet())
        return out

    def logits(self, tokens: torch.Tensor, nemo: Path | None = None) -> torch.Tensor:
        """Of the NeMo model, in fp32."""
        save_file({"tokens": tokens}, self.work / "tokens.safetensors")
        task = {"nemo": nemo or self.nemo, "tokens": self.work / "tokens.safetensors", "out": self.work / "logits"}
        order = {**{key: str(path) for key, path in task.items()}, "model_config": self.config}
        run_task("logits", order, self.work / "border", self.log, *quiet())
        return load_file(self.work / "logits")["logits"]

    @property
    def log(self) -> Path:
        return self.work / "log.txt"


def quiet() -> tuple[Progress, StopRequest]:
    return Progress(silent=True), StopRequest()


def same_tensors(one: Path, other: Path) -> bool:
    """Bit for bit."""
    a, b = Checkpoint.open(one), Checkpoint.open(other)
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    dp: int = 1


def write_rows(method: Method, file: Path, num_rows: int = 24, *, ranking: bool = False) -> None:
    """Rows of a method, of sums."""
    rows: list[dict[str, Any]] = []
    for i in range(num_rows):
        asked, right, wrong = f"What is {i} and {i}?\n", f"It is {2 * i}.", f"No {i}"
        if method == "sft":
            rows.append({"input": asked, "output": right})
        elif method == "dpo":
            rewards = {"chosen_reward": 1.0 + i % 3, "rejected_reward": 0.5}
            rows.append({"prompt": asked, "chosen_response": right, "rejected_response": wrong, **rewards})
        elif ranking:
            rows += [{"text": asked + right}, {"text": asked + wrong}]
        else:
            rows.append({"text": asked + (right if i % 2 else wrong), "label": [-100.0] * 4 + [4.0 * (i % 2)] * 5})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def training_config(
    method: Method,
    nemo: Path,
    rows: Path,
    work: Path,
    *,
    num_steps: int,
    layout: Layout = Layout(),
    keys: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A small training on the CPU."""
    key, sizes = TRAINER_KEYS[method], {"global_batch_size": 4, "micro_batch_size": 2}
    fill: dict[str, Any] = {
        "trainer.devices": layout.tp * layout.pp * layout.dp,
        "exp_manager.explicit_log_dir": str(work / "experiment"),
        "exp_manager.checkpoint_callback_params.model_parallel_size": layout.tp * layout.pp,
        "model.seed": 1234,
        "model.tensor_model_parallel_size": layout.tp,
        "model.pipeline_model_parallel_size": layout.pp,
        "model.encoder_seq_length": 128,
        "model.optim.lr": 1e-3,
        "model.optim.sched.warmup_steps": 1,
        "model.optim.sched.min_lr": 1e-4,
    }
    for name, value in {"max_epochs": num_steps, "max_steps": num_steps}.items():
        fill |= {f"trainer.{name}": value, f"trainer.{key}.{name}": value}
    fill |= {f"trainer.{key}.val_check_interval": 2, f"trainer.{key}.save_interval": 2}
    fill |= {f"model.{name}": value for name, value in sizes.items()}
    if method == "sft":
        fill["model.restore_from_path"] = str(nemo)
        for part in ("train_ds", "validation_ds"):
            values = {"file_path": str(rows), "max_seq_length": 128, **sizes}
            fill |= {f"model.data.{part}.{name}": value for name, value in values.items()}
    else:
        fill["pretrained_checkpoint.restore_from_path"] = str(nemo)
        fill["model.data.data_prefix"] = {part: [str(rows)] for part in ("train", "validation", "test")}
        fill["model.data.seq_length"] = 128
    if method == "dpo":
        fill |= {"model.dpo.log_prob_forward_micro_batch_size": 2, "model.dpo.ref_policy_kl_penalty": 0.1}
        fill["model.dpo.preference_loss"] = "dpo"
    if method == "reward_model":
        fill |= {"model.reward_model_type": "regression", "model.regression.num_attributes": 9}
        fill |= {"model.share_embeddings_and_output_weights": False, "model.forward_micro_batch_size": 2}
    return complete_config(method, {**fill, **(keys or {})}, {}, on_cpu=True, where="test")


def train(
    method: Method, config: dict[str, Any], nemo: Path, work: Path, layout: Layout = Layout()
) -> list[dict[str, float]]:
    """Its curves; the trained checkpoint is in `work/trained`."""
    work.mkdir(parents=True, exist_ok=True)
    task = {"config": config, "nemo": str(nemo), "out": str(work / "trained")}
    task["base_model_only"] = method == "reward_model"
    num_processes = layout.tp * layout.pp * layout.dp
    run_task(method, task, work, work / "log.txt", *quiet(), num_processes=num_processes, threads=1)
    return curves(work)


def curves(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "curves.jsonl").read_text().splitlines()]


def losses(rows: list[dict[str, float]], name: str = "train/loss") -> list[float]:
    """One figure of every step."""
    return [row[name] for row in rows if name in row]
