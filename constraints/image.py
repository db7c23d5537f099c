"""Pins for an image with its own build of torch: constraints that the Dockerfile passes to pip, and checks afterwards.

NVIDIA's images pin all of their packages in the file named by PIP_CONSTRAINT, and no set of versions satisfies both
these pins and those of this project. Therefore torch, the CUDA packages and everything built against them keep the
versions of the image, and all other packages follow constraints/newest.txt. The script only needs `packaging` and runs
before anything is installed.

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
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

KEPT = frozenset({"numpy", "scipy", "pandas", "protobuf", "pillow", "apex", "nemo-toolkit", "nemo-aligner"})
"""Packages that images build from source, or that other packages are built against."""
KEPT_PREFIXES = ("torch", "triton", "pytorch-triton", "nvidia-", "cuda-", "cupy", "transformer-engine", "flash-attn")
NEMO_PACKAGES = frozenset({"megatron-core", "transformers", "tokenizers", "huggingface-hub"})
"""Packages of NVIDIA's NeMo images. They keep their version where they are installed, and are pinned elsewhere."""
UNPINNED = frozenset({"contourpy", "tensorboard"})
"""Packages whose newest versions are incompatible with images (older numpy or protobuf); pip chooses the version."""
TRANSFORMER_ENGINE = "transformer-engine"
"""Package whose version must satisfy the requirement of the installed megatron-core."""


def is_kept(name: str) -> bool:
    """Return whether a package is never installed here, so that the image's version stays."""
    plain = canonicalize_name(name)
    return plain in KEPT or plain.startswith(KEPT_PREFIXES)


def keeps_version(name: str) -> bool:
    """Return whether an installed package keeps its version."""
    return is_kept(name) or canonicalize_name(name) in NEMO_PACKAGES


def installed() -> dict[str, str]:
    """Return name -> version of all packages of this Python."""
    return {canonicalize_name(one.metadata["Name"]): one.version for one in distributions() if one.metadata["Name"]}


def requirements_of(lines: Iterable[str]) -> Iterator[Requirement]:
    """Yield the requirements of a constraint file whose markers apply here; skip options, comments and paths."""
    for line in lines:
        text = re.sub(r"(^|\s)#.*$", "", line).split(" --hash", 1)[0].rstrip("\\ \t\r\n").strip()
        try:
            found = Requirement(text)
        except InvalidRequirement:
            continue
        if found.marker is None or found.marker.evaluate():
            yield found


def pins(own: Iterable[str], image: Iterable[str], versions: Mapping[str, str]) -> list[str]:
    """Return the lines of a constraint file that combines the pins of this project with those of an image.

    Kept packages are pinned to the installed version, or to the image's pin if they are not installed. If a kept
    package is incompatible with a pin of this project, the installed version is pinned instead.

    Args:
        own: lines of this project's constraint file.
        image: lines of the image's constraint file.
        versions: installed packages, name -> version.
    """
    found = {name: f"{name}=={version}" for name, version in versions.items() if keeps_version(name)}
    for line in requirements_of(image):
        name = canonicalize_name(line.name)
        if is_kept(name) and name not in found and line.url is None:
            found[name] = str(line)
    for line in requirements_of(own):
        name = canonicalize_name(line.name)
        if name in found or name in UNPINNED or is_kept(name):
            continue
        if _is_incompatible(line, versions):
            found[name] = f"{name}=={versions[name]}"
        else:
            found[name] = f"{name}{line.specifier}"
    return sorted(found.values())


def locked(lock: str, chosen: Iterable[str], versions: Mapping[str, str], names: Iterable[str] = ()) -> list[str]:
    """Return the lock file entries, with hashes, of the chosen pins that are not installed already.

    Args:
        lock: text of the lock file.
        chosen: lines of the constraint file.
        versions: installed packages, name -> version.
        names: packages to include; empty: all.
    """
    wanted = {canonicalize_name(line.name): str(line.specifier) for line in requirements_of(chosen)}
    only = {canonicalize_name(name) for name in names} or wanted.keys()
    found = []
    for entry in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE):
        for pin in requirements_of(entry.splitlines()[:1]):
            name = canonicalize_name(pin.name)
            if name in only and wanted.get(name) == str(pin.specifier) != f"=={versions.get(name)}":
                found.append(entry.rstrip())
    return found


def _is_incompatible(pin: Requirement, versions: Mapping[str, str]) -> bool:
    """Return whether an installed package that keeps its version does not accept the pinned version."""
    name = canonicalize_name(pin.name)
    pinned = [one.version for one in pin.specifier if one.operator == "=="]
    if name not in versions or len(pinned) != 1:
        return False
    return any(not specifier.contains(pinned[0], prereleases=True) for specifier in _specifiers(name, versions))


def _specifiers(name: str, versions: Mapping[str, str]) -> Iterator[SpecifierSet]:
    """Yield the specifiers for a package in the requirements of the packages that keep their versions."""
    for owner in versions:
        if not keeps_version(owner):
            continue
        for text in _requires(owner):
            found = Requirement(text)
            if canonicalize_name(found.name) == name and (found.marker is None or found.marker.evaluate({"extra": ""})):
                yield found.specifier


def _requires(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def problems(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Describe the kept packages that pip has changed, and an incompatible version of Transformer Engine."""
    for name, version in before.items():
        if now.get(name) != version:
            yield f"{name} was {version} in the image and is {now.get(name, 'missing')} now"
    if TRANSFORMER_ENGINE not in now:
        return
    for text in _requires("megatron-core"):
        needed = Requirement(text)
        version = now[TRANSFORMER_ENGINE]
        if canonicalize_name(needed.name) != TRANSFORMER_ENGINE:
            continue
        if not needed.specifier.contains(version, prereleases=True):
            yield (
                f"megatron-core {now['megatron-core']} requires {TRANSFORMER_ENGINE} {needed.specifier}, "
                f"but the image has {version}: choose another CORE_IMAGE"
            )


def main(argv: list[str]) -> int:
    """Run one of the commands in the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("pins")
    making.add_argument("own", type=Path)
    making.add_argument("image", type=Path, nargs="?")
    locking = commands.add_parser("locked")
    locking.add_argument("lock", type=Path)
    locking.add_argument("pins", type=Path)
    locking.add_argument("names", nargs="*", help="only these packages")
    commands.add_parser("kept").add_argument("more", nargs="*", help="additional packages that keep their version")
    commands.add_parser("check").add_argument("before", type=Path)
    args = parser.parse_args(argv)
    versions = installed()
    if args.command == "pins":
        image_lines = args.image.read_text().splitlines() if args.image and args.image.is_file() else []
        print("\n".join(pins(args.own.read_text().splitlines(), image_lines, versions)))
        return 0
    if args.command == "locked":
        print("\n".join(locked(args.lock.read_text(), args.pins.read_text().splitlines(), versions, args.names)))
        return 0
    if args.command == "kept":
        kept = {name: version for name, version in versions.items() if keeps_version(name) or name in args.more}
        print(json.dumps(kept, indent=1))
        return 0
    wrong = sorted(set(problems(json.loads(args.before.read_text()), versions)))
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
