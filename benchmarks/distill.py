"""What distillation costs: the bounded loss, a step against its parts, and the cache against the live teacher.

Timings are taken in turns in one process, and peaks of memory in processes of their own. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import interleaved, memory_gib

from nemo_minitron.distillation.objective import live_teacher, token_loss
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.losses import LogitsLoss, Loss
from nemo_minitron.stages.cache_teacher.params import CacheTeacherStage
from nemo_minitron.stages.distill.params import DistillStage

VOCAB_SIZE, NUM_TOKENS, HIDDEN_SIZE = 128_256, 4096, 512
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16384,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
TEACHER = {**SHAPE, "num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 1536}
STUDENT = {**SHAPE, "num_hidden_layers": 12, "hidden_size": 384, "intermediate_size": 768}
"""Half of the teacher's parameters."""
STEP: dict[str, Any] = {"num_steps": 1, "global_batch_size": 8, "seq_len_tokens": 256, "valid_num_tokens": 256}


def head_inputs() -> tuple[torch.Tensor, ...]:
    """Student and teacher before their output layers, in bf16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).bfloat16()

    student, teacher = normal(NUM_TOKENS, HIDDEN_SIZE), normal(NUM_TOKENS, HIDDEN_SIZE)
    weights = [normal(VOCAB_SIZE, HIDDEN_SIZE).mul_(HIDDEN_SIZE**-0.5) for _ in range(2)]
    return student.requires_grad_(), weights[0].requires_grad_(), teacher, weights[1]


def bounded(student: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, teacher_weight: torch.Tensor) -> None:
    """The package's loss: head, KL and their gradients over chunks of tokens."""
    tokens = torch.full((NUM_TOKENS,), 1 / NUM_TOKENS)
    labels = torch.zeros(NUM_TOKENS, dtype=torch.int64)
    distance = live_teacher(teacher, teacher_weight, LogitsLoss())
    token_loss(Loss(), student, weight, labels, tokens, distance)[0].backward()


def plain(student: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, teacher_weight: torch.Tensor) -> None:
    """Whole logits of both models, torch's softmax and autograd."""
    with torch.no_grad():
        log_p = (teacher @ teacher_weight.t()).float().log_softmax(-1)
    log_q = (student @ weight.t()).float().log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()


LOSSES: dict[str, Callable[..., None]] = {"bounded": bounded, "plain": plain}


def peak_gib(name: str) -> float:
    """Memory above what the inputs take, in a process of its own."""
    inputs = head_inputs()
    before = memory_gib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    LOSSES[name](*inputs)
    return memory_gib("VmHWM") - before


def bench_loss() -> dict[str, float]:
    peaks = {}
    for name in LOSSES:
        command = [sys.executable, __file__, "--peak", name]
        peaks[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    inputs = head_inputs()

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            for tensor in inputs[:2]:
                tensor.grad = None
            LOSSES[name](*inputs)

        return run

    times = interleaved({name: call(name) for name in LOSSES}, rounds=1)
    return {
        "bounded_extra_gib": peaks["bounded"],
        "plain_extra_gib": peaks["plain"],
        "memory_ratio": peaks["bounded"] / peaks["plain"],
        "bounded_s": times["bounded"],
        "plain_s": times["plain"],
        "speed_over_plain": times["plain"] / times["bounded"],
    }


def random_model(config: dict[str, Any], folder: Path) -> Path:
    from nemo_minitron.stages.init.params import InitStage
    from nemo_minitron.stages.init.run import _write_weights

    folder.mkdir()
    stage = {"kind": "init", "architecture": config, "tokenizer": {"vocab_size": 300, "sources": [{"source": "-"}]}}
    _write_weights(InitStage.model_validate(stage), {"bos_token_id": 0, "eos_token_id": 0, **config}, folder)
    return folder


def bench_step(root: Path) -> dict[str, float]:
    """A distillation step against teacher forward plus student forward and backward; and against a cached teacher."""
    from nemo_minitron.backends.megatron.data.datasets import step_batches
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.distillation.teacher_cache import write_cache
    from nemo_minitron.backends.megatron.model.forward import evaluating, model_logits
    from nemo_minitron.backends.megatron.model.weights import load_model
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training
    from nemo_minitron.distillation.cache import write_facts
    from nemo_minitron.system.progress import Progress
    from tests.support.tiny_data import tiny_data_dir

    teacher, student = random_model(TEACHER, root / "teacher"), random_model(STUDENT, root / "student")
    data = tiny_data_dir(root / "data", vocab_size=SHAPE["vocab_size"], num_documents=200)
    silent, parallel = Progress(silent=True), Parallel(micro_batch_size=8)
    draws = {"logits": {"sparse": {"kind": "sampled", "rounds": 50}}}
    live_keys = DistillStage.model_validate({"kind": "distill", "lr": 1e-5, **STEP})
    cached_keys = DistillStage.model_validate({"kind": "distill", "lr": 1e-5, "loss": draws, **STEP})
    cache_keys = {"num_samples": 8, "seq_len_tokens": 256, "sparse": draws["logits"]["sparse"]}
    with open_session(parallel, device="cpu") as session:
        (root / "cache").mkdir()
        cache = CacheTeacherStage.model_validate({"kind": "cache_teacher", **cache_keys})
        facts = write_cache(cache, teacher, data, root / "cache", session, silent)
        write_facts(root / "cache", facts)
        live = distill.prepare(live_keys, student, teacher, data, root / "live", session)
        cached = distill.prepare_cached(cached_keys, student, root / "cache", data, root / "cached", session)
        model, _ = load_model(teacher, session, precision="bf16", seq_len_tokens=256)
        batch = step_batches(live.samples, session, step=0, global_batch_size=8, micro_batch_size=8)[0]

        def teacher_forward() -> None:
            with torch.no_grad(), evaluating(model):
                model_logits(model, batch)

        def student_both() -> None:
            """As it would be trained alone, by Megatron's own cross entropy."""
            tokens = batch["tokens"]
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            live.trainable.ddp(tokens, positions, None, labels=tokens).mean().backward()

        times = interleaved(
            {
                "live": lambda: training.train_step(live, 0),
                "cached": lambda: training.train_step(cached, 0),
                "teacher_forward": teacher_forward,
                "student_forward_backward": student_both,
            }
        )
    parts = times["teacher_forward"] + times["student_forward_backward"]
    written = sum(shard.stat().st_size for shard in (root / "cache").glob("shard_*"))
    return {
        **times,
        "live_over_parts": times["live"] / parts,
        "live_over_cached": times["live"] / times["cached"],
        # Of random weights, whose draws hardly ever meet: text takes less.
        "cache_bytes_per_token": written / ((facts.num_samples + facts.num_heldout) * facts.seq_len_tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", choices=LOSSES)
    parser.add_argument("--only", choices=["loss", "step"])
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak_gib(arguments.peak))
        return
    results: dict[str, Any] = {"threads": torch.get_num_threads()}
    if arguments.only != "step":
        results["loss_128k_vocabulary_4096_tokens"] = bench_loss()
    if arguments.only != "loss":
        with tempfile.TemporaryDirectory() as root:
            results["step"] = bench_step(Path(root))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
