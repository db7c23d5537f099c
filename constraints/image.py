"""Pins for an image that brings its own torch: what the Dockerfile gives to pip, and what it checks afterwards.

NVIDIA's images pin every package of theirs in a file that PIP_CONSTRAINT names. Together with this project's pins no
set of versions fits both. So torch, CUDA's packages and all that is built against them keep the image's versions, and
the rest follows constraints/newest.txt. Needs `packaging` alone; runs before anything is installed.

    python constraints/image.py pins constraints/newest.txt [PIP_CONSTRAINT's file] > pins.txt
    python constraints/image.py locked constraints/newest.lock pins.txt [NAME ...] > locked.txt
    python constraints/image.py kept [NAME ...] > before.json
    python constraints/image.py check before.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

KEPT = frozenset({"numpy", "scipy", "pandas", "protobuf", "pillow", "apex", "nemo-toolkit", "nemo-aligner"})
"""Packages that an image builds itself, or builds others against."""
KEPT_PREFIXES = ("torch", "triton", "pytorch-triton", "nvidia-", "cuda-", "cupy", "transformer-engine", "flash-attn")
OF_NEMO = frozenset({"megatron-core", "transformers", "tokenizers", "huggingface-hub"})
"""Packages of NVIDIA's NeMo images: kept where they are installed, in any supported version, and pinned where not."""
UNPINNED = frozenset({"contourpy", "tensorboard"})
"""Packages whose newest versions refuse what images have (an older numpy or protobuf): pip takes one that fits."""
OF_MEGATRON = "transformer-engine"
"""Its version must be one that the installed megatron-core names."""


def is_kept(name: str) -> bool:
    """Whether a package is never installed by us: it stays as the image has it."""
    plain = canonicalize_name(name)
    return plain in KEPT or plain.startswith(KEPT_PREFIXES)


def stays(name: str) -> bool:
    """Whether an installed package keeps its version."""
    return is_kept(name) or canonicalize_name(name) in OF_NEMO


def installed() -> dict[str, str]:
    """Name -> version of everything that this Python has."""
    return {canonicalize_name(one.metadata["Name"]): one.version for one in distributions() if one.metadata["Name"]}


def requirements_of(lines: Iterable[str]) -> Iterator[Requirement]:
    """The pins of a constraint file that hold here; options, comments and paths are left out."""
    for line in lines:
        text = re.sub(r"(^|\s)#.*$", "", line).split(" --hash", 1)[0].rstrip("\\ \t\r\n").strip()
        try:
            found = Requirement(text)
        except InvalidRequirement:
            continue
        if found.marker is None or found.marker.evaluate():
            yield found


def pins(own: Iterable[str], image: Iterable[str], have: Mapping[str, str]) -> list[str]:
    """Lines of a constraint file: kept packages as they are installed, or as the image wants them; ours for the rest.

    A pin of ours that a kept package does not take gives way to the version that the image has.
    """
    found = {name: f"{name}=={version}" for name, version in have.items() if stays(name)}
    for line in requirements_of(image):
        name = canonicalize_name(line.name)
        if is_kept(name) and name not in found and line.url is None:
            found[name] = str(line)
    for line in requirements_of(own):
        name = canonicalize_name(line.name)
        if name in found or name in UNPINNED or is_kept(name):
            continue
        if _is_refused(line, have):
            found[name] = f"{name}=={have[name]}"
        else:
            found[name] = f"{name}{line.specifier}"
    return sorted(found.values())


def locked(lock: str, chosen: Iterable[str], have: Mapping[str, str], names: Iterable[str] = ()) -> list[str]:
    """Entries of a lock file, with their hashes: of the chosen pins, those that are not installed already.

    Args:
        names: these packages alone; empty: all.
    """
    wanted = {canonicalize_name(line.name): str(line.specifier) for line in requirements_of(chosen)}
    only = {canonicalize_name(name) for name in names} or wanted.keys()
    found = []
    for entry in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE):
        for pin in requirements_of(entry.splitlines()[:1]):
            name = canonicalize_name(pin.name)
            if name in only and wanted.get(name) == str(pin.specifier) != f"=={have.get(name)}":
                found.append(entry.rstrip())
    return found


def _is_refused(pin: Requirement, have: Mapping[str, str]) -> bool:
    """Whether a kept package that is installed asks for other versions than the pinned one."""
    name = canonicalize_name(pin.name)
    versions = [one.version for one in pin.specifier if one.operator == "=="]
    if name not in have or len(versions) != 1:
        return False
    return any(not wish.contains(versions[0], prereleases=True) for wish in _wishes(name, have))


def _wishes(name: str, have: Mapping[str, str]) -> Iterator[object]:
    for owner in have:
        if not stays(owner):
            continue
        for text in _requires(owner):
            wish = Requirement(text)
            if canonicalize_name(wish.name) == name and (wish.marker is None or wish.marker.evaluate({"extra": ""})):
                yield wish.specifier


def _requires(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def problems(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Kept packages that pip has changed, and a Transformer Engine that Megatron-Core does not take."""
    for name, version in before.items():
        if now.get(name) != version:
            yield f"{name} was {version} in the image and is {now.get(name, 'gone')} now"
    if OF_MEGATRON not in now:
        return
    for text in _requires("megatron-core"):
        wish = Requirement(text)
        version = now[OF_MEGATRON]
        if canonicalize_name(wish.name) == OF_MEGATRON and not wish.specifier.contains(version, prereleases=True):
            yield (
                f"megatron-core {now['megatron-core']} takes {OF_MEGATRON} {wish.specifier}, "
                f"and the image has {version}: choose another CORE_IMAGE"
            )


def main(words: list[str]) -> int:
    """The command line; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("pins")
    making.add_argument("own", type=Path)
    making.add_argument("image", type=Path, nargs="?")
    locking = commands.add_parser("locked")
    locking.add_argument("lock", type=Path)
    locking.add_argument("pins", type=Path)
    locking.add_argument("names", nargs="*", help="these packages alone")
    commands.add_parser("kept").add_argument("more", nargs="*", help="other packages that have to stay")
    commands.add_parser("check").add_argument("before", type=Path)
    said = parser.parse_args(words)
    have = installed()
    if said.command == "pins":
        theirs = said.image.read_text().splitlines() if said.image and said.image.is_file() else []
        print("\n".join(pins(said.own.read_text().splitlines(), theirs, have)))
        return 0
    if said.command == "locked":
        print("\n".join(locked(said.lock.read_text(), said.pins.read_text().splitlines(), have, said.names)))
        return 0
    if said.command == "kept":
        kept = {name: version for name, version in have.items() if stays(name) or name in said.more}
        print(json.dumps(kept, indent=1))
        return 0
    wrong = sorted(set(problems(json.loads(said.before.read_text()), have)))
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
