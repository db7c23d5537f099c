"""Process that computes rewards for the server in NeMo-Aligner's environment: a JSON line in, a JSON line out."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.errors import MinitronError
from nemo_minitron.evaluation.rewards import Answer, Rule, make_rules, rewards
from nemo_minitron.schema.rewards import RewardRule


def main(rules_file: Path) -> int:
    """Answer requests until the input ends.

    A request is a list of {"answer", "num_tokens", "row"}; the response is {"rewards": [...]} or {"error": text}.

    Args:
        rules_file: JSON list with the keys of the rules.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of the server closes the input; Ctrl-C is the runner's
    # A user's function may print; its text must not mix with the responses.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    rules = [RewardRule.model_validate(rule) for rule in json.loads(rules_file.read_text(encoding="utf-8"))]
    functions = make_rules(rules)
    for line in sys.stdin:
        out.write(json.dumps(_response(rules, functions, json.loads(line))) + "\n")
        out.flush()
    return 0


def _response(rules: Sequence[RewardRule], functions: Sequence[Rule], request: list[dict[str, Any]]) -> dict[str, Any]:
    answers = [Answer(each["row"]["text"], each["answer"], each["num_tokens"], each["row"]) for each in request]
    try:
        return {"rewards": rewards(rules, functions, answers)}
    except MinitronError as error:
        return {"error": str(error)}
    except Exception as error:  # a user's function may raise anything
        return {"error": f"a reward function raised {type(error).__name__}: {error}"}
