"""Run one task in NeMo-Aligner's environment, `python .../entry TASK.json`, or the tasks of a stage one after another,
`python .../entry fork_server SOCKET NAME...`, where SOCKET is an open file descriptor and NAME a key of TASKS."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import fork_server
from task import Task, load_backend_module, run

TASKS = {
    "self_test": "self_test:self_test",
    "to_nemo": "checkpoints:to_nemo",
    "from_nemo": "checkpoints:from_nemo",
    "logits": "checkpoints:logits",
    "sft": "sft:train",
    "dpo": "dpo:train",
    "reward_model": "reward_model:train",
    "annotate": "reward_model:annotate",
    "topk_logits": "distillation:topk_logits",
    "knowledge_distillation": "distillation:train",
    "steerlm2": "steerlm2:train",
    "steerlm2_batch": "steerlm2:batch",
    "preference_losses": "dpo:preference_losses",
    "reinforce": "reinforce:train",
    "ppo": "ppo:train",
    "critic_server": "ppo:serve_critic",
    "reinforce_loss": "rollout_losses:reinforce",
    "ppo_loss": "rollout_losses:ppo",
    "rollout_gradients": "rollout_gradients:gradients",
    "rule_server": "rule_server:serve",
    "reward_model_server": "reward_model:serve",
}
ALONE = ("preference_losses",)
"""Tasks that run without torch.distributed: with it, the functions that they call would require Megatron's groups."""
WITHOUT_NEMO = ("rule_server",)
"""Tasks that import neither torch nor NeMo, and so start in a second."""


def main() -> int:
    """Run the task of the file, or a fork server; returns the exit code."""
    if sys.argv[1] == fork_server.COMMAND:
        _prepare()
        for name in sys.argv[3:]:
            with suppress(Exception):  # the task that needs the module repeats the import and reports the error
                import_module(TASKS[name].split(":")[0])
        return fork_server.serve(int(sys.argv[2]), _run_file)
    task = json.loads(Path(sys.argv[1]).read_text())
    if task["task"] not in WITHOUT_NEMO:
        _prepare()
    return _run_file(Path(sys.argv[1]))


def _prepare() -> None:
    """Apply the patches that must precede the import of NeMo."""
    import cpu

    cpu.enable()
    load_backend_module("megatron/runtime/known_pickles.py").read_only_known_pickles()


def _run_file(file: Path) -> int:
    task = json.loads(file.read_text())
    code = run(Path(task["work_dir"]), _run, task)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _run(task: Task) -> Mapping[str, Any]:
    module, name = TASKS[task["task"]].split(":")
    function: Callable[[Task], Mapping[str, Any]] = getattr(import_module(module), name)
    if task["task"] in (*ALONE, *WITHOUT_NEMO):
        return function(task)
    from world import joined

    with joined():
        return function(task)


if __name__ == "__main__":
    os._exit(main())  # threads of PyTriton's clients would wait for a server that may have ended
