"""Names of container images, in the form that each runtime expects.

pyxis treats what begins with / or ./ as a file and everything else as a name, whose registry ends with #. Docker's
registries end with /. Apptainer treats everything without a scheme as a file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

FILE_SUFFIXES = (".sqsh", ".sqfs", ".squashfs", ".sif", ".simg", ".img")
APPTAINER = ("apptainer", "singularity")
_SCHEME = re.compile(r"[a-z][a-z0-9+-]*://|(?:docker-archive|docker-daemon|oci|oci-archive|containers-storage):")
_REGISTRY = re.compile(r"^(localhost|[^/#:]*\.[^/#:]*|[^/#]+:[0-9]+)/")


def is_file_name(image: str) -> bool:
    """Return whether a name denotes a file, judged by its prefix or its suffix."""
    return image.startswith(("/", "./", "../", "~/")) or (not has_scheme(image) and image.endswith(FILE_SUFFIXES))


def has_scheme(image: str) -> bool:
    """Return whether a name has a scheme (`docker://`, `oras://`, `docker-archive:`); a tag or a port is not one."""
    return _SCHEME.match(image) is not None


def absolute(runtime: str, image: str, folder: Path) -> str:
    """Return the name for a script: files as absolute paths, other names unchanged.

    Args:
        folder: base of relative paths.
    """
    if runtime == "docker" or has_scheme(image):
        return image
    path = folder / Path(image).expanduser()
    # Apptainer also runs folders. For pyxis, a folder with the name of an image is not the image.
    is_there = path.exists() if runtime in APPTAINER else path.is_file()
    return os.path.normpath(path) if is_file_name(image) or is_there else image


def problem(runtime: str, image: str, folder: Path) -> str | None:
    """Return what is wrong with the name of an image for a runtime."""
    if runtime == "pyxis":
        return _for_pyxis(image, folder)
    if runtime == "docker":
        return _for_docker(image)
    return _for_apptainer(image, folder) if runtime in APPTAINER else None


def missing(runtime: str, image: str, folder: Path) -> str | None:
    """Return the absolute path of an image that is a file and does not exist."""
    name = absolute(runtime, image, folder)
    if not name.startswith("/") or Path(name).exists():
        return None
    return name


def _for_pyxis(image: str, folder: Path) -> str | None:
    if absolute("pyxis", image, folder) != image or image.startswith(("/", "./")):
        return None  # A file: the script gets its absolute path.
    name = image.removeprefix("docker://")
    match = None if has_scheme(name) else _REGISTRY.match(name)
    if match:
        start = image.removesuffix(name)
        return f"{image} would be looked up on Docker Hub: write {start}{match[1]}#{name[match.end() :]}"
    return None


def _for_docker(image: str) -> str | None:
    if is_file_name(image):
        return f"{image} is a file, which docker does not run: write the name of an image"
    plain = re.sub(r"^[a-z]+://", "", image).replace("#", "/", 1)
    return None if plain == image else f"{image} is not a valid name for docker: write {plain}"


def _for_apptainer(image: str, folder: Path) -> str | None:
    if not has_scheme(image) and absolute("apptainer", image, folder) != image:
        return None
    if image.startswith("dockerd://"):
        return f"{image} is not a valid name for Apptainer: write docker-daemon:{image.removeprefix('dockerd://')}"
    if "#" in image:
        name = image.removeprefix("docker://").replace("#", "/", 1)
        return f"{image} is not a valid name for Apptainer: write docker://{name}"
    if not has_scheme(image):
        return f"{image} would be a file for Apptainer: write docker://{image}, or the path of a .sif file"
    return None
