"""The work folder of a stage: whose it is, and when another recipe may go on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.store import Store
from nemo_minitron.plan.fingerprint import differences, fingerprint
from nemo_minitron.plan.planner import StageCall
from nemo_minitron.progress import Progress

PAYLOAD_FILE, ACCEPTED_FILE = "payload.json", "accepted_work.json"
RESUMABLE_KINDS = ("distill", "train", "correct")
ADJUSTABLE = {
    "lr",
    "pretraining_lr",
    "min_lr",
    "warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "weight_decay",
    "clip_grad",
    "valid_interval_steps",
    "valid_num_tokens",
    "save_interval_steps",
    "keep_checkpoints",
}
"""Keys that may differ from those with which a training checkpoint was made: what it holds fits all the same."""


def open_work(
    call: StageCall, store: Store, *, accept_drift: bool, progress: Progress
) -> tuple[Path, list[dict[str, Any]]]:
    """(work folder, what of its contents was begun with other keys).

    A training that was begun with another learning rate or the like goes on when the user accepts it; else, and
    for everything else, a folder that was begun for something else is moved away.
    """
    folder = store.work(call.name)
    changed = _changed_keys(folder, call)
    if changed:
        told = "; ".join(changed)
        if accept_drift:
            progress.say(f"goes on with what was begun with other keys ({told})")
            _accept(folder, call, changed)
        else:
            progress.say(f"starts again, as it was begun with other keys ({told}); --accept-drift would go on with it")
    work = store.open_work(call.name, call.fingerprint)
    (work / PAYLOAD_FILE).write_text(json.dumps(call.payload))
    accepted = work / ACCEPTED_FILE
    return work, json.loads(accepted.read_text()) if accepted.is_file() else []


def _changed_keys(folder: Path, call: StageCall) -> list[str]:
    """How the keys differ from those with which a training in this folder was begun, when it could go on with them."""
    file = folder / PAYLOAD_FILE
    if call.kind not in RESUMABLE_KINDS or not file.is_file():
        return []
    begun = json.loads(file.read_text())
    if fingerprint(begun) == call.fingerprint or _unadjustable(begun) != _unadjustable(call.payload):
        return []
    return [text.removeprefix("params.") for text in differences(begun, call.payload)]


def _unadjustable(payload: Mapping[str, Any]) -> str:
    """Fingerprint of the keys that must be the same."""
    params = _without_adjustable(payload["params"])
    if params.get("teacher_correction"):
        params["teacher_correction"] = _without_adjustable(params["teacher_correction"])
    return fingerprint({**payload, "params": params})


def _without_adjustable(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in ADJUSTABLE}


def _accept(folder: Path, call: StageCall, changed: list[str]) -> None:
    """Give the folder to this call, and remember what it was."""
    file = folder / ACCEPTED_FILE
    known = json.loads(file.read_text()) if file.is_file() else []
    begun = fingerprint(json.loads((folder / PAYLOAD_FILE).read_text()))
    file.write_text(json.dumps([*known, {"fingerprint": begun, "changed": changed}]))
    Store.claim_work(folder, call.fingerprint)
