"""Packing the installed files of this package as a wheel, without a build, a network or a checkout.

The same files give the same bytes. After a wheel install, this is what was installed; after an editable install, it is
the current state of the checkout.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import nemo_minitron
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.system.places import CONFIGS, CONSTRAINTS, RECIPES, SHIPPED, shipped_dir

_PACKAGE, _PROJECT = "nemo_minitron", "nemo-minitron"
_METADATA = ("METADATA", "entry_points.txt", "licenses/LICENSE")
_WHEEL = "Wheel-Version: 1.0\nGenerator: nemo-minitron\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_TIME = (1980, 1, 1, 0, 0, 0)


def write_own_wheel(folder: Path) -> Path:
    """Write the wheel into a folder.

    Raises:
        EnvironmentProblem: the package is not installed, or its metadata are of another version.
    """
    version = nemo_minitron.__version__
    info = f"{_PACKAGE}-{version}.dist-info"
    content = {name: file.read_bytes() for name, file in _package_files()}
    content |= {f"{info}/{name}": text.encode() for name, text in _metadata(version).items()}
    lines = [f"{name},{_record_hash(data)},{len(data)}\n" for name, data in sorted(content.items())]
    content[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"]).encode()
    wheel = folder / f"{_PACKAGE}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in content.items():
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return wheel


def _package_files() -> Iterator[tuple[str, Path]]:
    """Yield (name in the wheel, file), in a fixed order."""
    package = Path(nemo_minitron.__file__).resolve().parent
    for file in _files(package):
        name = file.relative_to(package)
        if name.parts[0] != SHIPPED:
            yield f"{_PACKAGE}/{name.as_posix()}", file
    for shipped in (CONFIGS, CONSTRAINTS, RECIPES):
        folder = shipped_dir(shipped)
        for file in _files(folder):
            yield f"{_PACKAGE}/{SHIPPED}/{shipped}/{file.relative_to(folder).as_posix()}", file


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def _metadata(version: str) -> dict[str, str]:
    found = _installed()
    if found.version != version:
        raise EnvironmentProblem(
            f"This is nemo-minitron {version}, but its installed metadata are of version {found.version}.",
            where=str(Path(nemo_minitron.__file__).parent),
            next_step="Install it again: `pip install -e .` in the checkout.",
        )
    texts = {name: found.read_text(name) for name in _METADATA}
    return {"WHEEL": _WHEEL, **{name: text for name, text in texts.items() if text is not None}}


def _installed() -> Distribution:
    try:
        return distribution(_PROJECT)
    except PackageNotFoundError as error:
        raise EnvironmentProblem(
            "nemo-minitron is not installed here, so the requirements of its wheel are unknown.",
            next_step="Run `pip install -e .` in the checkout, or use --no-wheels.",
        ) from error


def _record_hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
