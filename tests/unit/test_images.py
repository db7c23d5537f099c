"""Names of images: files become absolute paths, and names that a runtime would misread are reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nemo_minitron.launch.images import absolute, missing, problem
from tests.conftest import REPO


@pytest.mark.parametrize(
    ("runtime", "image", "name"),
    [
        ("pyxis", "core.sqsh", "/here/core.sqsh"),
        ("pyxis", "./core", "/here/core"),
        ("pyxis", "../core.sqsh", "/core.sqsh"),
        ("pyxis", "/images/core.sqsh", "/images/core.sqsh"),
        ("pyxis", "nvcr.io#nvidia/nemo:24.12", "nvcr.io#nvidia/nemo:24.12"),
        ("pyxis", "dockerd://nemo-minitron:core", "dockerd://nemo-minitron:core"),
        ("apptainer", "core.sif", "/here/core.sif"),
        ("apptainer", "docker://nvcr.io/nvidia/nemo:24.12", "docker://nvcr.io/nvidia/nemo:24.12"),
        ("docker", "nemo-minitron:core", "nemo-minitron:core"),
    ],
)
def test_files_are_absolute_and_names_stay(runtime: str, image: str, name: str) -> None:
    assert absolute(runtime, image, Path("/here")) == name
    assert problem(runtime, image, Path("/here")) is None


def test_an_existing_path_is_a_file_with_any_name(tmp_path: Path) -> None:
    (tmp_path / "core").write_text("")
    (tmp_path / "ubuntu").mkdir()
    assert absolute("pyxis", "core", tmp_path) == str(tmp_path / "core")
    assert absolute("pyxis", "ubuntu", tmp_path) == "ubuntu", "a folder is no image of pyxis"
    assert absolute("apptainer", "ubuntu", tmp_path) == str(tmp_path / "ubuntu"), "but one of Apptainer"
    assert absolute("docker", "core", tmp_path) == "core"
    assert missing("pyxis", "core", tmp_path) is None
    assert missing("pyxis", "none.sqsh", tmp_path) == str(tmp_path / "none.sqsh")
    assert missing("docker", "none", tmp_path) is None


@pytest.mark.parametrize(
    ("runtime", "image", "write"),
    [
        ("pyxis", "nvcr.io/nvidia/nemo:24.12", "write nvcr.io#nvidia/nemo:24.12"),
        ("pyxis", "docker://nvcr.io/nvidia/nemo:24.12", "write docker://nvcr.io#nvidia/nemo:24.12"),
        ("pyxis", "localhost:5000/nemo", "write localhost:5000#nemo"),
        ("docker", "nvcr.io#nvidia/nemo:24.12", "write nvcr.io/nvidia/nemo:24.12"),
        ("docker", "docker://nvcr.io/nvidia/nemo:24.12", "write nvcr.io/nvidia/nemo:24.12"),
        ("docker", "core.sif", "a file, which docker does not run"),
        ("apptainer", "nvcr.io/nvidia/nemo:24.12", "write docker://nvcr.io/nvidia/nemo:24.12"),
        ("singularity", "nvcr.io#nvidia/nemo:24.12", "write docker://nvcr.io/nvidia/nemo:24.12"),
        ("apptainer", "docker://nvcr.io#nvidia/nemo", "write docker://nvcr.io/nvidia/nemo"),
        ("apptainer", "dockerd://nemo-minitron:core", "write docker-daemon:nemo-minitron:core"),
        ("apptainer", "nemo-minitron:core", "would be a file for Apptainer"),
    ],
)
def test_a_spelling_of_another_runtime_is_named_with_the_right_one(runtime: str, image: str, write: str) -> None:
    assert write in str(problem(runtime, image, Path("/here")))


@pytest.mark.parametrize("image", ["ubuntu", "ubuntu:24.04", "nvidia/cuda:12.4", "registry-host#team/x:1"])
def test_names_of_docker_hub_and_of_other_registries_are_fine_for_pyxis(image: str) -> None:
    assert problem("pyxis", image, Path("/here")) is None


def test_the_shipped_sites_spell_their_images_as_their_runtimes_do() -> None:
    for file in sorted((REPO / "configs/cluster").glob("*.yaml")):
        container = yaml.safe_load(file.read_text()).get("container", {"runtime": "none"})
        for key in ("core_image", "aligner_image"):
            if key in container:
                assert problem(container["runtime"], container[key], REPO) is None, file
                assert container["runtime"] == "docker" or container[key].startswith("./"), file
