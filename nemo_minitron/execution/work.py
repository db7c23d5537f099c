"""The work folder of a stage: whose it is, and when another recipe may go on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.store import Store
from nemo_minitron.plan.fingerprint import differences, fingerprint
from nemo_minitron.plan.planner import StageCall
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.files import read_json, write_whole
from nemo_minitron.system.progress import Progress

PAYLOAD_FILE, ACCEPTED_FILE = "payload.json", "accepted_work.json"
FORGOTTEN = "the stage goes on, and only forgets with which other keys it was begun"
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
    folder = store.own_work(call.name)
    changed = _changed_keys(folder, call)
    if changed:
        told = "; ".join(changed)
        if accept_drift:
            progress.say(f"goes on with what was begun with other keys ({told})")
            _accept(folder, call, changed)
        else:
            progress.say(f"starts again, as it was begun with other keys ({told}); --accept-drift would go on with it")
    if _is_begun_for(call, folder):
        # Whatever has become of the file that says so.
        store.claim_work(folder, call.fingerprint)
    work = store.open_work(call.name, call.fingerprint)
    if not _is_begun_for(call, work):
        write_whole(work / PAYLOAD_FILE, json.dumps(call.payload))
    return work, _accepted(work)


def _begun_with(folder: Path) -> Any:
    """The payload for which a work folder was begun; None when it does not say."""
    file = folder / PAYLOAD_FILE
    return read_json(file, f"Delete it: {FORGOTTEN}.") if file.is_file() else None


def _is_begun_for(call: StageCall, folder: Path) -> bool:
    begun = _begun_with(folder)
    return begun is not None and fingerprint(begun) == call.fingerprint


def _accepted(folder: Path) -> list[dict[str, Any]]:
    file = folder / ACCEPTED_FILE
    return list(read_json(file, f"Delete it: {FORGOTTEN}.")) if file.is_file() else []


def _changed_keys(folder: Path, call: StageCall) -> list[str]:
    """How the keys differ from those with which a training in this folder was begun, when it could go on with them."""
    begun = _begun_with(folder)
    if begun is None or not STAGES[call.kind].resumes_with_other_rates:
        return []
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
    entry = {"fingerprint": fingerprint(_begun_with(folder)), "changed": changed}
    write_whole(folder / ACCEPTED_FILE, json.dumps([*_accepted(folder), entry]))
    Store.claim_work(folder, call.fingerprint)
