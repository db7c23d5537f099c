"""Short ways into NeMo-Aligner's environment."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, load

from nemo_minitron.api import load_recipe
from nemo_minitron.backends.alignment.nemo_aligner import convert
from nemo_minitron.backends.alignment.nemo_aligner.config import TRAINER_KEYS, Method, complete_config
from nemo_minitron.backends.alignment.nemo_aligner.environment import aligner_python
from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.execution.runner import RunOptions, run_recipe
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress


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


def require_aligner() -> None:
    """Skip where there is no NeMo-Aligner; `make test` makes its environment, and sets the variable that forbids it."""
    try:
        aligner_python()
    except EnvironmentProblem:
        if os.environ.get("MINITRON_REQUIRE_ALIGNER"):
            raise
        pytest.skip("minitron env aligner has not been run")


def finished(recipe: Path, root: Path) -> Path:
    """The folder of a run of the recipe, from beginning to end; skips where there is no NeMo-Aligner."""
    require_aligner()
    loaded = load_recipe(recipe, [f"execution.run_root={root}"])
    run_recipe(loaded, RunOptions(), quiet=True)
    return root / loaded.name


def same_tensors(one: Path, other: Path) -> bool:
    """Bit for bit."""
    a, b = Checkpoint.open(one), Checkpoint.open(other)
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    dp: int = 1


def write_rows(
    method: Method, file: Path, num_rows: int = 24, *, ranking: bool = False, conditioned: bool = False
) -> None:
    """Rows of a method, of sums."""
    rows: list[dict[str, Any]] = []
    for i in range(num_rows):
        asked, right, wrong = f"What is {i} and {i}?\n", f"It is {2 * i}.", f"No {i}"
        if conditioned:
            asked += f"Attributes: verbosity:{4 * (i % 2)}\n"
            right = f"{i} and {i} are {2 * i}. {right}" if i % 2 else right
        if method in ("sft", "topk_logits"):
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
    rows_per_batch: int = 4,
    keys: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A small training on the CPU."""
    # A row of SteerLM 2.0 is a prompt with several answers.
    sizes = {"global_batch_size": rows_per_batch, "micro_batch_size": 1 if method == "steerlm2" else 2}
    key = TRAINER_KEYS[method]
    fill: dict[str, Any] = {
        "trainer.num_nodes": 1,
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
    if method in ("sft", "steerlm2"):
        fill["model.restore_from_path"] = str(nemo)
        for part in ("train_ds", "validation_ds"):
            values = {"file_path": str(rows), "max_seq_length": 128, **sizes}
            fill |= {f"model.data.{part}.{name}": value for name, value in values.items()}
    else:
        fill["pretrained_checkpoint.restore_from_path"] = str(nemo)
        fill["model.data.data_prefix"] = {part: [str(rows)] for part in ("train", "validation", "test")}
        fill["model.data.seq_length"] = 128
    if method == "steerlm2":
        fill |= {"model.steerlm2.micro_batch_size": 1, "model.steerlm2.forward_micro_batch_size": 1}
    if method == "knowledge_distillation":
        names = {"kd_loss": "fwd_kl", "kd_loss_weight": 1.0, "sft_loss_weight": 0.0}
        fill |= {f"model.knowledge_distillation.{name}": value for name, value in names.items()}
        fill["model.data.top_k"] = None
        for name, value in files_of(rows).items():
            fill[f"model.data.{name}"] = value
    if method == "dpo":
        fill |= {"model.dpo.log_prob_forward_micro_batch_size": 2, "model.dpo.ref_policy_kl_penalty": 0.1}
        fill["model.dpo.preference_loss"] = "dpo"
    if method == "reward_model":
        fill |= {"model.reward_model_type": "regression", "model.regression.num_attributes": 9}
        fill |= {"model.share_embeddings_and_output_weights": False, "model.forward_micro_batch_size": 2}
    return complete_config(method, {**fill, **(keys or {})}, {}, on_cpu=True, where="test")


def files_of(name: Path) -> dict[str, int]:
    """How many files of a cache there are, and how many rows each has."""
    files = list(name.parent.glob(name.name.replace("CHUNK_ID", "*")))
    return {"n_chunks": len(files), "n_examples_per_chunk": len(files[0].read_text().splitlines())}


def ask_teacher(nemo: Path, rows: Path, out: Path, work: Path, *, top_k: int, layout: Layout = Layout()) -> None:
    """Cache a teacher's top logits, four rows in a file."""
    sizes = {"micro_batch_size": 2, "global_batch_size": 4}
    fill: dict[str, Any] = {
        "output_path": str(out),
        "top_k": top_k,
        "trainer.devices": layout.tp * layout.pp * layout.dp,
        "trainer.num_nodes": 1,
        "pretrained_checkpoint.restore_from_path": str(nemo),
        "model.tensor_model_parallel_size": layout.tp,
        "model.pipeline_model_parallel_size": layout.pp,
        "model.encoder_seq_length": 128,
        "data.data.file_path": str(rows),
        "data.data.max_seq_length": 128,
        **{f"model.{name}": value for name, value in sizes.items()},
    }
    config = complete_config("topk_logits", fill, {}, on_cpu=True, where="test")
    task = {"config": config, "nemo": str(nemo), "rows_per_file": 4}
    num_processes = layout.tp * layout.pp * layout.dp
    run_task("topk_logits", task, work, work / "log.txt", *quiet(), num_processes=num_processes, threads=1)


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


def reward_head(nemo: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the weight [outputs, hidden] and bias [outputs] of a reward model's head."""
    reader = FileSystemReader(nemo / "model_weights")
    kept = reader.read_metadata().state_dict_metadata
    names = ("model.rm_head.weight", "model.rm_head.bias")
    head = {name: torch.empty(kept[name].size) for name in names}
    load(head, storage_reader=reader, no_dist=True)
    return head[names[0]], head[names[1]]
