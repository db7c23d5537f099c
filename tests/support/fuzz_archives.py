"""Fuzzed readers of packed and pickled files: `.nemo` files, training checkpoints, and bundles."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from tests.support.fuzz import ODD, as_json, changed, damaged_bytes

_OPEN = ExitStack()
"""Objects that readers keep open until their process ends."""

# --- .nemo files ----------------------------------------------------------------------------------

Member = tuple[tarfile.TarInfo, bytes]


def good_nemo(folder: Path) -> list[Member]:
    """Make an archive with a config and some files of weights, and the model as which it is read."""
    from nemo_minitron.backends.alignment.nemo_aligner.model_config import nemo_model_config
    from nemo_minitron.hf.checkpoint import Checkpoint
    from tests.support.tiny_models import tiny_model_dir

    like = tiny_model_dir(folder, "llama_gqa_tied", num_hidden_layers=1)
    config = nemo_model_config(Checkpoint.open(like).shape, like, seq_len_tokens=64, on_cpu=True, where=str(like))
    contents = {
        "model_config.yaml": yaml.safe_dump(config).encode(),
        "model_weights/metadata.json": b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}',
        "model_weights/.metadata": b"\x80\x02}.",
        "model_weights/" + "long/" * 30 + "__0_0.distcp": bytes(2000),
    }
    members = [(_header(f"./{name}", content), content) for name, content in contents.items()]
    (folder / "model.nemo").write_bytes(_tar(members))
    return members


def _tar(members: list[Member], form: int = tarfile.GNU_FORMAT) -> bytes:
    """Write headers unchecked."""
    out = b""
    for info, content in members:
        try:
            header = info.tobuf(form, errors="surrogateescape")
        except (ValueError, TypeError, OverflowError, AttributeError, UnicodeError):
            header = tarfile.TarInfo("x").tobuf(form)
        out += header + content + bytes(-len(content) % 512)
    return out + bytes(1024)


def bad_nemo(rng: random.Random, good: list[Member], folder: Path) -> None:
    """Write another config, odd headers, or damaged bytes; some archives are compressed."""
    members = [(_header(info.name, content), content) for info, content in good]
    kind = rng.randrange(4)
    if kind == 0:
        content = _config_bytes(rng, good[0][1])
        members[0] = (_header(good[0][0].name, content), content)
    elif kind == 1:
        for _ in range(rng.choice([1, 1, 2])):
            _change_header(rng, rng.choice(members)[0])
        rng.shuffle(members)
    data = _tar(members, rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]))
    if kind == 2:
        data = damaged_bytes(rng, data, rng.choice([512, 4096, len(data)]))
    if kind == 3 or rng.random() < 0.2:
        data = gzip.compress(data, 1)
    if kind == 3:
        data = damaged_bytes(rng, data, rng.choice([20, len(data)]))
    (folder / "model.nemo").write_bytes(data)


def _config_bytes(rng: random.Random, good: bytes) -> bytes:
    return damaged_bytes(rng, good) if rng.random() < 0.5 else as_json(rng, yaml.safe_load(good))


def _header(name: str, content: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info


_TYPES = (*(bytes([code]) for code in range(48, 56)), b"x", b"g", b"L", b"K", b"S", b"D", b"V", b"\0", b"\xff")
_NAMES = ("../up", "/etc/passwd", "a/../../b", "", ".", "..", "\0", "x" * 300, "a\nb", "\udcff", "model_config.yaml")
_PAX = ("path", "size", "linkpath", "mtime", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major", "hdrcharset")


def _change_header(rng: random.Random, info: tarfile.TarInfo) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        info.type, info.linkname = rng.choice(_TYPES), rng.choice(_NAMES)
    elif kind == 1:
        info.name = rng.choice(_NAMES)
    elif kind == 2:
        info.size = rng.choice([0, 1, 511, 1 << 20, 1 << 32, (1 << 63) - 1, -1])
    elif kind == 3:
        info.mode = rng.choice([0, 0o7777, 0o111])
    elif kind == 4:
        info.mtime = rng.choice([-1, 1 << 62, 1e300])
    else:
        info.pax_headers = {rng.choice(_PAX): rng.choice(["", "-1", "9" * 30, "0,1,2", "../x", "1" * 5000, "BINARY"])}


def read_nemo(folder: Path) -> None:
    """Unpack as `minitron convert` does before it starts NeMo."""
    from nemo_minitron.backends.alignment.nemo_aligner.unpack import model_config, unpacked
    from nemo_minitron.hf.checkpoint import Checkpoint

    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    nemo, like = folder / "model.nemo", folder / "llama_gqa_tied"
    model_config(unpacked(nemo, work), nemo, Checkpoint.open(like).shape, like)


# --- training checkpoints -------------------------------------------------------------------------

_TRAINABLE: dict[Path, Any] = {}


def good_checkpoint(folder: Path) -> dict[str, bytes]:
    """Make a checkpoint of a short training, whose model and optimizer stay open to load others."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training
    from nemo_minitron.backends.megatron.training.checkpoint import checkpoints
    from nemo_minitron.schema.execution import Parallel
    from nemo_minitron.stages.train.params import TrainStage
    from nemo_minitron.system.progress import Progress
    from tests.support.tiny_data import tiny_data_dir
    from tests.support.tiny_models import tiny_model_dir

    model, data = (
        tiny_model_dir(folder / "model", "llama_gqa_tied", num_hidden_layers=1),
        tiny_data_dir(folder / "data"),
    )
    sizes = {"num_steps": 1, "global_batch_size": 1, "seq_len_tokens": 16, "valid_num_tokens": 16, "lr": 1e-3}
    params = TrainStage(kind="train", precision="fp32", save_interval_steps=1, keep_checkpoints=1, **sizes)
    session = _OPEN.enter_context(open_session(Parallel(), device="cpu", threads=1))
    job = distill.prepare_training(params, model, data, folder, session)
    training.run(job, folder, Progress(silent=True))
    _TRAINABLE[folder] = (session, job.trainable)
    (found,) = checkpoints(folder / "checkpoints")
    return {file.name: file.read_bytes() for file in found.iterdir()}


def bad_checkpoint(rng: random.Random, good: dict[str, bytes], folder: Path) -> None:
    """Change one file, and mostly update the checksums, as an attacker can."""
    name = rng.choice(sorted(good))
    try:
        content = _CHANGES.get(name, _damaged)(rng, good[name]) if rng.random() < 0.6 else _damaged(rng, good[name])
    except Exception:  # it cannot be pickled
        content = _damaged(rng, good[name])
    files = {**good, name: content}
    if rng.random() < 0.1:
        del files[name]
    if name != "training.json" and rng.random() < 0.9:
        files["training.json"] = _sealed(files)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    target = folder / "checkpoints/step_00000001"
    target.mkdir(parents=True)
    for file, data in files.items():
        (target / file).write_bytes(data)


def _damaged(rng: random.Random, data: bytes) -> bytes:
    return damaged_bytes(rng, data, rng.choice([64, 1000, len(data)]))


def _sealed(files: dict[str, bytes], facts: Any = None) -> bytes:
    from nemo_minitron.system.files import sealed

    listed = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
        if name != "training.json"
    }
    known = {"step": 1, "good_losses": [], "distributed_optimizer": False, "files": listed}
    return json.dumps(sealed({**known, **(facts or {})})).encode()


def _changed_facts(rng: random.Random, data: bytes) -> bytes:
    from nemo_minitron.system.files import SEAL, sealed

    found = changed(rng, {key: value for key, value in json.loads(data).items() if key != SEAL})
    try:
        return json.dumps(sealed(found) if isinstance(found, dict) else found).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError, UnicodeError):
        return as_json(rng, found)


def _changed_json(rng: random.Random, data: bytes) -> bytes:
    return as_json(rng, json.loads(data))


def _changed_common(rng: random.Random, data: bytes) -> bytes:
    import torch

    out = io.BytesIO()
    torch.save(changed(rng, torch.load(io.BytesIO(data), weights_only=False)), out)
    return out.getvalue()


def _changed_contents(rng: random.Random, data: bytes) -> bytes:
    """Write odd values into the index: location of a tensor, its sizes, offsets and type."""
    found = pickle.loads(data)
    for _ in range(rng.choice([1, 1, 2])):
        table = vars(found)[rng.choice(["storage_data", "state_dict_metadata"])]
        key = rng.choice(list(table))
        value: Any = table[key]
        for _ in range(rng.randrange(4)):
            inside = value if isinstance(value, list) else list(getattr(value, "__dict__", {}).values())
            value = next((one for one in rng.sample(inside, len(inside)) if hasattr(one, "__dict__")), value)
        kind = rng.randrange(4)
        if kind == 0:
            table[key] = rng.choice([*ODD, table[rng.choice(list(table))]])
        elif kind == 1:
            del table[key]
        elif getattr(value, "__dict__", None):
            object.__setattr__(value, rng.choice(sorted(vars(value))), rng.choice([*ODD, (9, 9), (1 << 40,)]))
    return pickle.dumps(found)


_CHANGES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "training.json": _changed_facts,
    "metadata.json": _changed_json,
    "common.pt": _changed_common,
    ".metadata": _changed_contents,
}


def read_checkpoint(folder: Path) -> None:
    """Load the checkpoint as a resumed training does."""
    from nemo_minitron.backends.megatron.training.checkpoint import Checkpoints

    session, trainable = _TRAINABLE[folder]
    Checkpoints(folder / "checkpoints", session, keep=1, in_background=False).resume(trainable)


# --- bundles --------------------------------------------------------------------------------------


def good_bundle(folder: Path) -> dict[str, bytes]:
    """Make a bundle without wheels. Its recipe is checked by the `minitron` on the PATH, which always succeeds."""
    from nemo_minitron.bundle.archive import write_archive
    from nemo_minitron.bundle.items import Item
    from nemo_minitron.system.progress import Progress
    from tests.support.bundles import INSTALL, unpacked

    script = Item("install.sh", INSTALL.read_bytes(), "script")
    items = [script, Item("recipes/mine.yaml", b"{}", "recipe"), Item("data/a b.txt", b"text", "data")]
    facts = {"recipes": [{"file": "recipes/mine.yaml"}], "target": {"system": "x", "machine": "y", "python": "3.10"}}
    for old in ("there", "bin"):
        shutil.rmtree(folder / old, ignore_errors=True)
    (folder / "mine.tar").unlink(missing_ok=True)
    write_archive(folder / "mine.tar", items, facts, Progress(silent=True))
    bundle = unpacked(folder / "mine.tar", folder / "there")
    (folder / "bin").mkdir()
    (folder / "bin/minitron").write_text("#!/bin/sh\nexit 0\n")
    (folder / "bin/minitron").chmod(0o755)
    return {str(file.relative_to(bundle)): file.read_bytes() for file in bundle.rglob("*") if file.is_file()}


_LINES = (b"", b"x", b"  ", b"../x", b"/etc/passwd", b"-", b"--help", b"\\x", b"a\0b", b"\xff\xfe", b"x" * 5000, b" *")


def bad_bundle(rng: random.Random, good: dict[str, bytes], folder: Path) -> None:
    """Damage a list, or change a file and update its checksum."""
    files, kind = dict(good), rng.randrange(3)
    if kind == 0:
        files["SHA256SUMS"] = damaged_bytes(rng, good["SHA256SUMS"])
    elif kind == 1:
        lines = good["SHA256SUMS"].split(b"\n")
        lines.insert(rng.randrange(len(lines)), rng.choice([b"", b"0" * 64 + b"  "]) + rng.choice(_LINES))
        files["SHA256SUMS"] = b"\n".join(lines)
    else:
        files["manifest.json"] = as_json(rng, json.loads(good["manifest.json"]))
        named = [name for name in files if name != "SHA256SUMS"]
        sums = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in named]
        files["SHA256SUMS"] = "".join(sums).encode()
    bundle = folder / "there/mine"
    shutil.rmtree(bundle, ignore_errors=True)
    for name, content in files.items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(content)


def read_bundle(folder: Path) -> None:
    """Run install.sh to its end: it must succeed or print `error: ...`."""
    from nemo_minitron.errors import MinitronError

    environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "PYTHON": sys.executable, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["/bin/sh", "install.sh"],
        cwd=folder / "there/mine",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=8,
        check=False,
    )
    output = done.stderr.decode(errors="replace")
    if done.returncode == 2 and "error: " in output and "Traceback" not in output:
        raise MinitronError(output)
    if done.returncode or output:
        raise AssertionError(f"code {done.returncode}: {output[-1500:]}")
