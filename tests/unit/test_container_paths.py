"""What containers see of the host: mounts behind links, variables, and the program of a job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from nemo_minitron import api
from nemo_minitron.execution.runner import RunOptions
from nemo_minitron.launch import record
from nemo_minitron.launch.containers import HOST_VARIABLES, bind, inside, is_visible, mounts_of
from nemo_minitron.launch.context import JobFolders, own_program
from nemo_minitron.launch.docker import launcher
from nemo_minitron.launch.docker.command import docker_run
from nemo_minitron.schema.cluster import Cluster, Container, Mount
from tests.conftest import TOY

IMAGE = Container(runtime="docker", core_image="x")


def _folders(project: Path) -> JobFolders:
    run = project / "runs/toy"
    return JobFolders(project, run, project / "assets", run / "launch/001")


def _sources(folders: JobFolders, *mounts: Mount) -> set[str]:
    return {bind(mount) for mount in mounts_of(IMAGE.model_copy(update={"mounts": mounts}), folders)}


def _same(*paths: Path) -> set[str]:
    return {f"{path}:{path}" for path in paths}


def test_folders_behind_links_are_mounted_where_the_links_lead(tmp_path: Path) -> None:
    project, scratch = tmp_path / "project", tmp_path / "scratch"
    folders = _folders(project)
    project.mkdir()
    (scratch / "toy").mkdir(parents=True)
    assert _sources(folders) == _same(project)
    (project / "runs").symlink_to(scratch)
    assert _sources(folders) == _same(project, scratch / "toy")
    # A relative link, and one that leads to another link: only the first place outside needs a mount.
    (project / "assets").symlink_to("../shared/assets")
    (tmp_path / "shared").symlink_to(scratch)
    assert _sources(folders) == _same(project, scratch / "toy", tmp_path / "shared/assets")
    assert _sources(folders, Mount(source=str(tmp_path))) == _same(project, tmp_path)


def test_a_link_within_a_mounted_folder_needs_no_mount(tmp_path: Path) -> None:
    (tmp_path / "data/toy").mkdir(parents=True)
    (tmp_path / "runs").symlink_to("data")
    folders = _folders(tmp_path)
    assert _sources(folders) == _same(tmp_path)
    assert is_visible(tmp_path / "runs/toy", mounts_of(IMAGE, folders))
    (tmp_path / "loop").symlink_to("loop")
    assert not is_visible(tmp_path.parent / "other", mounts_of(IMAGE, folders))
    is_visible(tmp_path / "loop", mounts_of(IMAGE, folders))


def test_a_relative_mount_begins_at_the_folder_of_the_call(tmp_path: Path) -> None:
    found = _sources(_folders(tmp_path), Mount(source="data", target="/data"), Mount(source="../x", read_only=True))
    assert {f"{tmp_path}/data:/data", f"{tmp_path.parent}/x:{tmp_path.parent}/x:ro"} < found
    with pytest.raises(ValidationError, match="target"):
        Mount(source="/data", target="data")


def _words(cluster: Cluster, folders: JobFolders) -> list[str]:
    if cluster.container.runtime == "docker":
        return docker_run(["minitron"], cluster, "core", folders, user="1:1", terminal=False)
    return inside(["minitron"], cluster, "core", folders)


@pytest.mark.parametrize("runtime", ["docker", "apptainer"])
def test_containers_on_this_machine_get_the_agent_of_the_site(runtime: str, tmp_path: Path) -> None:
    container = Container(runtime=runtime, core_image="docker://x")  # type: ignore[arg-type]
    agents = [Cluster(container=container, agent=agent) for agent in ("torchrun", "ft_launcher")]
    found = [any("MINITRON_AGENT=ft_launcher" in word for word in _words(site, _folders(tmp_path))) for site in agents]
    assert found == [False, True]


@pytest.mark.parametrize("name", ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_the_cache_of_the_hub_is_that_of_the_site_or_that_of_the_assets(name: str, tmp_path: Path) -> None:
    site = Cluster(container=IMAGE, environment={name: "/site"})
    assert f"--env=HF_HUB_CACHE={tmp_path}/assets/.huggingface/hub" in _words(
        Cluster(container=IMAGE), _folders(tmp_path)
    )
    assert not any(word.startswith("--env=HF_HUB_CACHE=") for word in _words(site, _folders(tmp_path)))


def test_docker_passes_variables_that_stages_read() -> None:
    words = _words(Cluster(container=IMAGE), _folders(Path("/p")))
    assert {f"--env={name}" for name in ("WANDB_MODE", "OMP_NUM_THREADS", "MINITRON_TRUSTED_FOLDERS")} < set(words)


def test_apptainer_on_this_machine_gets_no_paths_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a stand-in that records its environment, with keys of a site that only Slurm's jobs read."""
    program, seen = tmp_path / "apptainer", tmp_path / "seen"
    program.write_text(f"#!/bin/sh\nenv >{seen}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in HOST_VARIABLES:
        monkeypatch.setenv(name, "/host")
    container = "execution.cluster.container={runtime: apptainer, core_image: 'docker://x/y:z'}"
    keys = [f"execution.run_root={tmp_path}/runs", container, "execution.cluster.modules=[cuda]"]
    output: list[str] = []
    launcher.submit(api.load_plan(TOY, keys, checked=False), RunOptions(until="teacher"), output.append)
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert "PATH" in names
    assert not set(HOST_VARIABLES) & names
    (warning,) = output
    assert "execution.cluster.modules has no effect on this machine" in warning


def test_jobs_use_the_program_that_is_running_or_the_one_beside_python_or_python_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = [tmp_path / folder / "minitron" for folder in ("user", "venv")]
    for program in programs:
        program.parent.mkdir()
        program.write_text("")
        program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/python"))
    monkeypatch.setattr(sys, "argv", [str(programs[0])])
    assert own_program() == [str(programs[0])]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "nemo_minitron/__main__.py")])
    assert own_program() == [str(programs[1])]
    programs[1].unlink()
    python, _, word = own_program()
    assert (python, word) == (sys.executable, "minitron")


def test_python_itself_starts_the_program_without_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = sys.executable
    monkeypatch.setattr(sys, "argv", ["notebook"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    words = [python, *own_program()[1:], "stage", "no.json", "distill"]
    (tmp_path / "typer.py").write_text("raise SystemExit('imported from the working folder')")
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "There is no no.json" in done.stderr) == (2, True), done.stderr


def test_other_folders_beside_those_of_submissions_are_ignored(tmp_path: Path) -> None:
    for name in ("002", "1000", "002.bak", "3 copy"):
        folder = tmp_path / "launch" / name
        folder.mkdir(parents=True)
        record.Submission(folder, "slurm", 0.0).write()
    last = record.newest(tmp_path)
    assert last is not None
    assert (last.folder.name, record.next_folder(tmp_path).name) == ("1000", "1001")
