"""Finished stages of a made-up run: files and results with plausible numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.pruning.plan_file import to_ranges

LAYERS, HIDDEN, FFN, HEADS = 30, 576, 1536, 9
_SOURCE = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "num_query_groups": 3,
    "kv_channels": 64,
}
_TEACHER_PARAMS, _STUDENT_PARAMS = 134_515_008, 93_872_448
PROMPTS = ("The water cycle begins when", "Question: Why do leaves change color in autumn?\nAnswer:")
_QUALITY: Mapping[str, tuple[float, float, tuple[float, ...]]] = {
    # bits per byte, nats per token, hellaswag, piqa, arc_easy, sciq
    "teacher": (1.107, 3.442, (0.47, 0.71, 0.52, 0.75)),
    "distilled": (1.264, 3.932, (0.39, 0.65, 0.43, 0.68)),
    "pruned": (1.669, 5.192, (0.35, 0.55, 0.37, 0.57)),
    "random": (3.589, 11.162, (0.31, 0.45, 0.29, 0.24)),
}
_TEXTS = {
    "teacher": (" the sun heats the water in a river or lake, and it turns into vapor.", " Chlorophyll breaks down."),
    "distilled": (" the sun is aligned with the water.\n\nThe water is the most likely to rise.", ""),
    "pruned": (" the water cycle begins when the water cycle begins when", " 1. Explanation of why the answer is."),
    "random": (", which by other which will\n body other other multi is is is", "facebook facebook did did if other"),
}
_TASKS = ("hellaswag", "piqa", "arc_easy", "sciq")


_INPUTS: Mapping[str, Mapping[str, Any]] = {
    "data": {"tokenizer": "teacher"},
    "score": {"model": "teacher", "data": "data"},
    "select": {"model": "teacher", "scores": "score"},
    "select_random": {"model": "teacher"},
    "prune": {"model": "teacher", "plan": "select"},
    "prune_random": {"model": "teacher", "plan": "select_random"},
    "distill": {"student": "prune", "teacher": "teacher", "data": "data"},
    "evaluate_teacher": {"model": "teacher", "data": "data"},
    "evaluate_distilled": {"model": "distill", "data": "data"},
    "evaluate_pruned": {"model": "prune", "data": "data"},
    "evaluate_random": {"model": "prune_random", "data": "data"},
    "export": {"model": "distill", "teacher": "teacher", "evaluations": ["evaluate_teacher"]},
}


def fake_run(
    root: Path,
    *,
    depth: bool = False,
    search: bool = False,
    leave_out: tuple[str, ...] = (),
    student: str = "distilled",
) -> dict[str, Artifact]:
    """Create {stage name: artifact}, in the order of a run.

    Args:
        depth: the plan drops layers by LM loss; otherwise it cuts the MLP.
        search: the shape was chosen by a search.
        leave_out: names of stages that did not run.
        student: label of the distilled model.
    """
    target = {**_SOURCE, "num_layers": 24} if depth else {**_SOURCE, "ffn_hidden_size": 752}
    stages = [
        _stage(root, "teacher", "import", 26.2, {**_model(_SOURCE, _TEACHER_PARAMS), "source": "hf:example/teacher"}),
        _data(root),
        _stage(root, "check_teacher", "check_teacher", 21.2, {"loss_nats_per_token": 3.44, "num_tokens": 8192}),
        _score(root, depth),
        *([_search(root)] if search else []),
        _select(root, "select", target, "importance"),
        _select(root, "select_random", target, "random"),
        _stage(root, "prune", "prune", 0.9, _model(target, _STUDENT_PARAMS)),
        _stage(root, "prune_random", "prune", 0.5, _model(target, _STUDENT_PARAMS)),
        _distill(root, target),
        *(_evaluate(root, label, student if label == "distilled" else label) for label in _QUALITY),
        _speed(root, student),
        _stage(root, "export", "export", 0.3, _model(target, _STUDENT_PARAMS)),
    ]
    kept = [stage for stage in stages if stage.stage not in leave_out]
    return {stage.stage: replace(stage, inputs=_INPUTS.get(stage.stage, {})) for stage in kept}


def _stage(root: Path, name: str, kind: str, wall_s: float, result: dict[str, Any]) -> Artifact:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {
        "nemo_minitron": "0.1.0",
        "python": "3.11.7",
        "versions": {"torch": "2.6.0", "megatron-core": "0.16.1"},
        "host": "secret-host",
        "argv": ["minitron", "run", "/home/someone/recipe.yaml"],
        "git_commit": "0123456789abcdef",
        "started": f"2026-01-02T03:{len(list(root.iterdir())):02d}:00Z",
        "wall_s": wall_s,
    }
    fingerprint = f"{sum(map(ord, name)):04x}".ljust(64, "a")
    return Artifact(name, kind, folder, fingerprint, result, provenance)


def _model(sizes: Mapping[str, int], num_params: int, dtype: str = "float32") -> dict[str, Any]:
    return {
        "architecture": "LlamaForCausalLM",
        "num_params": num_params,
        "num_params_non_embedding": num_params - 28_311_552,
        "dtype": dtype,
        "checkpoint_bytes": num_params * (4 if dtype == "float32" else 2),
        "license": "apache-2.0",
        "shape": {**sizes, "vocab_size": 49152, "tied_embeddings": True},
    }


def _data(root: Path) -> Artifact:
    totals = {"train_num_tokens": 6_579_684, "valid_num_tokens": 130_987, "valid_num_bytes": 574_272}
    return _stage(root, "data", "tokenize", 9.0, {**totals, "sources": ["asset:benchmark-train-passages"]})


def _score(root: Path, depth: bool) -> Artifact:
    stage = _stage(root, "score", "score", 33.6, {"num_samples": 64, "seq_len_tokens": 256})
    generator = np.random.default_rng(0)

    def falling(size: int, steepness: float) -> Any:
        return np.exp(-steepness * np.linspace(0, 1, size)) + 4 * np.exp(-60 * np.linspace(0, 1, size))

    middle = np.abs(np.linspace(-1, 1, LAYERS))
    scores = {"layers.block_influence": 0.03 + 0.9 * middle**12 + 0.02 * generator.random(LAYERS)}
    baseline = 3.44
    if depth:
        scores["layers.lm_loss"] = baseline + 0.02 + 2.5 * middle**6 + 0.05 * generator.random(LAYERS)
    else:
        steepness = generator.uniform(1.5, 3.5, LAYERS)
        scores["hidden"] = generator.permutation(falling(HIDDEN, 3.0))
        for axis, size in (("ffn", FFN), ("heads", HEADS)):
            rows = [(1 + layer / 6) * falling(size, steepness[layer]) for layer in range(LAYERS)]
            scores[axis] = generator.permuted(np.array(rows), axis=1)
    save_file({name: value.astype(np.float32) for name, value in scores.items()}, stage.path / "scores.safetensors")
    facts = {**stage.result, "baseline_lm_loss": baseline} if depth else dict(stage.result)
    (stage.path / "scores.json").write_text(json.dumps(facts))
    return stage


def _search(root: Path) -> Artifact:
    """Return six candidates of about the same size, three of which were trained further."""
    shapes = {
        # layers, hidden, ffn, heads; zero-shot loss, losses after the rungs
        "c03": ((30, 576, 752, 9), 5.192, (4.402, 4.012)),
        "c05": ((27, 576, 896, 9), 5.611, (4.447, 4.041)),
        "c02": ((30, 512, 976, 9), 5.483, (4.520, 4.118)),
        "c01": ((24, 576, 1072, 9), 6.870, (4.731,)),
        "c04": ((30, 576, 880, 6), 6.402, (4.755,)),
        "c06": ((20, 576, 1376, 9), 8.314, (5.096,)),
    }
    candidates = []
    for rank, (name, ((layers, hidden, ffn, heads), zero_shot, losses)) in enumerate(shapes.items(), 1):
        num_params = 49_152 * hidden + hidden + layers * hidden * (2 * 64 * (heads + 3) + 3 * ffn + 2)
        candidates.append(
            {
                "name": name,
                "num_params": num_params,
                "num_layers": layers,
                "hidden_size": hidden,
                "ffn_hidden_size": ffn,
                "num_attention_heads": heads,
                "num_query_groups": 3,
                "kv_channels": 64,
                "memory_gib": round((2 * num_params + 2 * 2 * layers * 3 * 64 * 4096) / 2**30, 4),
                "decode_ms": round(1.1 + 0.03 * layers, 3),
                "generate_tokens_per_s": None,
                "zero_shot_loss": zero_shot,
                "losses": list(losses),
                "rank": rank,
            }
        )
    for one in candidates:
        one["on_pareto_front"] = not any(
            other["num_params"] < one["num_params"] and other["losses"][-1] < one["losses"][-1] for other in candidates
        )
    limits = {"num_params": 94_000_000, "num_params_tolerance": 0.05, "num_params_min": None, "num_params_max": None}
    stage = _stage(root, "search", "search", 95.0, {"winner": "c03"})
    document = {
        "schema": 1,
        "constraints": {
            **limits,
            "max_memory_gib": 0.5,
            "context_tokens": 4096,
            "batch_size": 1,
            "max_decode_ms": None,
        },
        "rungs": [
            {"num_steps": 10, "num_candidates": 6, "tokens_each": 10_240},
            {"num_steps": 30, "num_candidates": 3, "tokens_each": 30_720},
        ],
        "candidates": candidates,
        "winner": "c03",
        "rank_correlation": 0.733,
    }
    (stage.path / "search.json").write_text(json.dumps(document))
    return stage


def _select(root: Path, name: str, target: Mapping[str, int], method: str) -> Artifact:
    stage = _stage(root, name, "select", 1.0, {"method": method, "num_params": _STUDENT_PARAMS, "target": dict(target)})
    kept_layers = [layer for layer in range(LAYERS) if target["num_layers"] == LAYERS or not 12 <= layer < 18]
    ffn = np.random.default_rng(1).permutation(FFN)[: target["ffn_hidden_size"]]
    if method == "importance" and target["ffn_hidden_size"] < FFN:
        from safetensors.numpy import load_file

        ffn = np.argsort(-load_file(root / "score/scores.safetensors")["ffn"], axis=1)[:, : target["ffn_hidden_size"]]
    by_layer = np.broadcast_to(ffn, (LAYERS, ffn.shape[-1]))
    document = {
        "schema": 1,
        "method": method,
        "source": _SOURCE,
        "target": dict(target),
        "num_params": {"source": _TEACHER_PARAMS, "target": _STUDENT_PARAMS},
        "keep": {
            "layers": to_ranges(kept_layers),
            "hidden": "all",
            "ffn": {str(layer): to_ranges(sorted(map(int, by_layer[layer]))) for layer in kept_layers},
            "heads": {str(layer): "all" for layer in kept_layers},
        },
    }
    (stage.path / "prune_plan.json").write_text(json.dumps(document))
    return stage


def _distill(root: Path, target: Mapping[str, int]) -> Artifact:
    num_steps, tokens_per_step, teacher_loss = 140, 1024, 3.48
    result = {
        **_model(target, _STUDENT_PARAMS, "bfloat16"),
        "data_sources": ["asset:benchmark-train-passages"],
        "loss": "forward KL to the live teacher's logits, no other loss",
        "num_steps": num_steps,
        "tokens": num_steps * tokens_per_step,
        "wall_s": 347.0,
        "data_used": [
            {
                "source": "asset:benchmark-train-passages",
                "weight": 1.0,
                "tokens": num_steps * tokens_per_step,
                "epochs": num_steps * tokens_per_step / 6_579_684,
            }
        ],
        "initial_valid_loss": 5.226,
        "final_valid_loss": 4.054,
        "initial_valid_teacher_loss": teacher_loss,
        "final_valid_teacher_loss": teacher_loss,
        "initial_valid_kl": 1.912,
        "final_valid_kl": 0.811,
    }
    stage = _stage(root, "distill", "distill", 350.8, result)
    wobble = np.random.default_rng(2).normal(0, 0.06, num_steps + 1)
    rows = []
    for step in range(num_steps + 1):
        left = float(np.exp(-step / 45))
        if step:
            rows.append(
                {
                    "step": step,
                    "train_loss": 0.75 + 1.15 * left + float(wobble[step]),
                    "lr": 5e-4,
                    "grad_norm": 1.0,
                    "tokens": step * tokens_per_step,
                    "tokens_per_s": 410.0,
                }
            )
        if step % 35 == 0:
            losses = {"valid_loss": 3.99 + 1.236 * left, "valid_teacher_loss": teacher_loss}
            rows.append({"step": step, "valid_kl": 0.76 + 1.152 * left, **losses})
    (stage.path / "curves.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return stage


def _evaluate(root: Path, label: str, shown: str) -> Artifact:
    bits, loss, scores = _QUALITY[label]
    sizes = {**_SOURCE} if label == "teacher" else {**_SOURCE, "ffn_hidden_size": 752}
    model = _model(
        sizes,
        _TEACHER_PARAMS if label == "teacher" else _STUDENT_PARAMS,
        "bfloat16" if label == "distilled" else "float32",
    )
    tasks = {
        task: {"acc": score, "acc_stderr": 0.049, "acc_norm": score - 0.02, "acc_norm_stderr": 0.048}
        for task, score in zip(_TASKS, scores, strict=True)
    }
    metrics = {
        "label": shown,
        **{key: model[key] for key in ("num_params", "num_params_non_embedding", "checkpoint_bytes", "dtype")},
        "loss_nats_per_token": loss,
        "perplexity": float(np.exp(loss)),
        "bits_per_byte": bits,
        "num_tokens": 24213,
        "num_bytes": 108_654,
        "tasks_limit": 100,
        "tasks": tasks,
    }
    stage = _stage(root, f"evaluate_{label}", "evaluate", 52.0 if label == "teacher" else 41.0, metrics)
    samples = [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, _TEXTS[label], strict=True)]
    (stage.path / "metrics.json").write_text(json.dumps({**metrics, "samples": samples}))
    return stage


def _speed(root: Path, student: str) -> Artifact:
    rates = {"teacher": (1280.0, 37.4), student: (1656.0, 42.0), "pruned": (1648.0, 41.8), "random": (1651.0, 41.9)}
    models = {
        label: {
            "prefill_tokens_per_s": prefill,
            "prefill_tokens_per_s_min": prefill * 0.96,
            "prefill_tokens_per_s_max": prefill * 1.03,
            "prefill_ratio": prefill / 1280.0,
            "generate_tokens_per_s": generate,
            "generate_tokens_per_s_min": generate * 0.97,
            "generate_tokens_per_s_max": generate * 1.02,
            "generate_ratio": generate / 37.4,
        }
        for label, (prefill, generate) in rates.items()
    }
    facts = {"device": "cpu", "threads": 2, "precision": "bf16", "relative_to": "teacher", "models": models}
    return _stage(root, "speed", "speed", 8.1, facts)
