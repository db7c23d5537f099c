"""The work folder of a stage: which recipe it belongs to, and when another recipe may resume from it."""

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
DELETE_IT = "Delete it: the stage then resumes, but has no record of the keys with which it was started."
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
    "save_interval_steps",
    "keep_checkpoints",
}
"""Keys with which a training can resume from a checkpoint even if they differ from those that made it.

The held-out text is none of them: losses before and after would be of different texts.
"""


def open_work(call: StageCall, store: Store, progress: Progress) -> tuple[Path, list[dict[str, Any]]]:
    """Open the work folder; return it with the changes of keys that were accepted for its contents.

    A folder that belongs to other keys is moved away.
    """
    folder = store.own_work(call.name)
    changed = _changed_keys(folder, call)
    if changed:
        changes = "; ".join(changed)
        progress.say(f"starts again, because its keys have changed ({changes}); --accept-drift would resume it")
    if _is_started_for(call, folder):
        # Claim it even if the file with the owner's fingerprint is missing.
        store.claim_work(folder, call.fingerprint)
    work = store.open_work(call.name, call.fingerprint)
    if not _is_started_for(call, work):
        _record_payload(work, call)
    return work, _accepted(work)


def accept_work(call: StageCall, store: Store, progress: Progress) -> None:
    """Let an unfinished training resume with the keys of this call, if only adjustable ones have changed."""
    if not store.work(call.name).exists():
        return
    folder = store.own_work(call.name)
    changed = _changed_keys(folder, call)
    if changed:
        progress.say(f"resumes work that was started with other keys ({'; '.join(changed)})", call.name, "bold")
        entry = {"fingerprint": fingerprint(_started_with(folder)), "changed": changed}
        write_whole(folder / ACCEPTED_FILE, json.dumps([*_accepted(folder), entry]))
        _record_payload(folder, call)
        store.claim_work(folder, call.fingerprint)


def _record_payload(folder: Path, call: StageCall) -> None:
    write_whole(folder / PAYLOAD_FILE, json.dumps(call.payload))


def _started_with(folder: Path) -> Any:
    """Return the payload of the stage that started a work folder; None if it is not recorded."""
    file = folder / PAYLOAD_FILE
    return read_json(file, DELETE_IT) if file.is_file() else None


def _is_started_for(call: StageCall, folder: Path) -> bool:
    started = _started_with(folder)
    return started is not None and fingerprint(started) == call.fingerprint


def _accepted(folder: Path) -> list[dict[str, Any]]:
    file = folder / ACCEPTED_FILE
    return list(read_json(file, DELETE_IT)) if file.is_file() else []


def _changed_keys(folder: Path, call: StageCall) -> list[str]:
    """List the keys that differ from those of the training in this folder, if it could resume with the new ones."""
    started = _started_with(folder)
    if started is None or not STAGES[call.kind].resumes_with_other_rates:
        return []
    if fingerprint(started) == call.fingerprint or _unadjustable(started) != _unadjustable(call.payload):
        return []
    return [text.removeprefix("params.") for text in differences(started, call.payload)]


def _unadjustable(payload: Mapping[str, Any]) -> str:
    """Return the fingerprint of the keys that must be equal for resuming."""
    params = _without_adjustable(payload["params"])
    if params.get("teacher_correction"):
        params["teacher_correction"] = _without_adjustable(params["teacher_correction"])
    return fingerprint({**payload, "params": params})


def _without_adjustable(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in ADJUSTABLE}
