"""`python .../entry TASK.json`: one task for NeMo-Aligner, in the environment that has it."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

from task import answer

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
    "preference_losses": "dpo:preference_losses",
}


def main() -> int:
    """Run the task that the file names."""
    import cpu

    task = json.loads(Path(sys.argv[1]).read_text())
    cpu.enable()
    module, function = TASKS[task["task"]].split(":")
    return answer(Path(task["work_dir"]), getattr(import_module(module), function), task)


if __name__ == "__main__":
    sys.exit(main())
