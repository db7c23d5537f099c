"""`minitron check --cluster` and `launch`, with stand-ins for Slurm's programs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_minitron.api import load_plan, load_recipe
from nemo_minitron.errors import EnvironmentProblem, PlanError
from nemo_minitron.execution.runner import RunOptions
from nemo_minitron.launch.probe import probe
from nemo_minitron.launch.record import newest
from nemo_minitron.launch.slurm import submit
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import make_plan
from tests.conftest import TOY
from tests.support.fake_slurm import FakeSlurm

SINFO = 'case "$*" in *%R*) echo "== be nice =="; echo "gpu|up|infinite|gpu:8|4|16|64000|idle";; *) echo "gpu*";; esac'


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm", monkeypatch)
    fake.set("sinfo", SINFO)
    fake.set("srun", 'echo "  --container-image=x"')
    monkeypatch.chdir(tmp_path)
    return fake


def _keys(tmp_path: Path, *words: str) -> list[str]:
    return [f"execution.run_root={tmp_path}/runs", "launcher=slurm", "execution.device=auto", *words]


def _found(tmp_path: Path, *words: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"ok": [], "warning": [], "problem": []}
    for finding in probe(load_plan(TOY, _keys(tmp_path, *words), checked=False)):
        found[finding.level].append(finding.text)
    return found


def test_an_image_that_is_missing_or_misspelt_is_a_problem(fake: FakeSlurm, tmp_path: Path) -> None:
    assert _found(tmp_path, "cluster=slurm_pyxis")["problem"] == [
        f"container.core_image: there is no file {tmp_path}/nemo-minitron-core.sqsh"
    ]
    (tmp_path / "nemo-minitron-core.sqsh").write_text("")
    assert _found(tmp_path, "cluster=slurm_pyxis")["problem"] == []
    named = "cluster.container.core_image=nvcr.io/nvidia/nemo:24.12"
    (wrong,) = _found(tmp_path, "cluster=slurm_pyxis", named)["problem"]
    assert "write nvcr.io#nvidia/nemo:24.12" in wrong
    with pytest.raises(PlanError, match=r"write nvcr\.io#nvidia/nemo:24\.12"):
        submit.submit(
            load_plan(TOY, _keys(tmp_path, "cluster=slurm_pyxis", named), checked=False),
            RunOptions(),
            lambda text: None,
        )


def test_requests_of_jobs_are_compared_with_the_nodes(fake: FakeSlurm, tmp_path: Path) -> None:
    found = _found(tmp_path, "cluster=slurm", "cluster.cpu.cpus_per_node=32", "cluster.cpu.mem_gib=100")
    assert "select on gpu: needs 32 cores per node; its nodes have 16" in found["problem"]
    assert "select on gpu: needs 100 GiB per node; its nodes have 62.5" in found["problem"]
    fake.set("sinfo", SINFO.replace("|idle", "|drain*"))
    assert any(
        "nodes; 0 are up now, so the job would wait" in text for text in _found(tmp_path, "cluster=slurm")["warning"]
    )
    fake.set("sinfo", "echo '=== maintenance ==='")
    assert "sinfo lists no partitions here" in _found(tmp_path, "cluster=slurm")["problem"]


def test_one_fitting_partition_of_a_list_is_enough(fake: FakeSlurm, tmp_path: Path) -> None:
    small = SINFO.replace("|idle", "|idle\\nsmall|up|infinite|gpu:1|1|16|64000|idle").replace("echo", "echo -e", 2)
    fake.set("sinfo", small)
    found = _found(tmp_path, "cluster=slurm", "cluster.partition='small,gpu'", "cluster.cpu.partition=gpu")
    text = "distill on small: needs 8 GPUs per node; its nodes have 1"
    assert (found["problem"], text in found["warning"]) == ([], True)
    assert text in _found(tmp_path, "cluster=slurm", "cluster.partition=small")["problem"]


def test_the_folder_of_a_source_that_no_container_sees_is_named(fake: FakeSlurm, tmp_path: Path) -> None:
    outside, link = tmp_path / "elsewhere/model", tmp_path / "here/model"
    outside.mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(outside)
    os.chdir(link.parent)
    runs = ("cluster=slurm_pyxis", f"execution.run_root={link.parent}/runs")
    for source, seen in ((outside, outside), ("./model", link), ("model/.", link)):
        found = _found(tmp_path, *runs, f"stages.teacher.source={source}")
        text = f"stages.teacher.source: containers do not see {seen}; add it to container.mounts"
        assert text in found["warning"]
        mount = f"cluster.container.mounts=[{{source: {outside}, read_only: true}}]"
        assert _found(tmp_path, *runs, f"stages.teacher.source={source}", mount)["warning"] == []


def test_a_command_of_the_site_that_is_missing_is_a_problem(fake: FakeSlurm, tmp_path: Path) -> None:
    text = "cluster.command: there is no program /nowhere/minitron here"
    assert _found(tmp_path, "cluster=slurm", "cluster.command=/nowhere/minitron")["problem"] == [text]
    assert _found(tmp_path, "cluster=slurm", "cluster.command=minitron-of-a-module")["problem"] == []


def test_jobs_that_would_get_one_core_are_named(fake: FakeSlurm, tmp_path: Path) -> None:
    assert _found(tmp_path, "cluster=slurm")["warning"] == []
    (warning,) = _found(tmp_path, "cluster=slurm", "cluster.cpu.cpus_per_node=null")["warning"]
    assert "mostly 1 core" in warning
    assert "select" in warning


def test_launch_records_the_right_ids_after_a_banner_and_reports_what_it_omits(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = f"n=$(( $(cat {tmp_path}/n 2>/dev/null || echo 100) + 1 )); echo $n >{tmp_path}/n"
    fake.set("sbatch", f"{count}; echo '2 node hours will be charged'; echo $n")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    output: list[str] = []
    recipe = load_recipe(TOY, _keys(tmp_path, "cluster=slurm"))
    done = submit.submit(make_plan(recipe), RunOptions(), output.append)
    assert done is not None
    assert done.job_ids == [str(number) for number in range(101, 101 + len(done.jobs))]
    assert "SBATCH_ACCOUNT" not in fake.environment("sbatch")
    assert any("SBATCH_ACCOUNT" in text for text in output)
    # A second launch does not know whether they are still there.
    with pytest.raises(EnvironmentProblem, match="does not say whether job 101 is still there"):
        submit.submit(make_plan(recipe), RunOptions(), output.append)


def test_a_failed_submission_cancels_jobs_that_only_the_queue_lists(fake: FakeSlurm, tmp_path: Path) -> None:
    recipe = load_recipe(TOY, _keys(tmp_path, "cluster=slurm"))
    folder = run_dir(recipe).absolute() / "launch/001"
    fake.set(
        "sbatch",
        f'if [ -e {tmp_path}/one ]; then echo "sbatch: error: no more" >&2; exit 1; fi; touch {tmp_path}/one; echo 101',
    )
    fake.set("squeue", f"echo '101|{folder}/teacher.sh'; echo '102|{folder}/data.sh'; echo '9|/other/launch/001/x.sh'")
    fake.set("scancel", 'echo "scancel: error: Access/permission denied" >&2; exit 1')
    output: list[str] = []
    with pytest.raises(EnvironmentProblem, match="no more"):
        submit.submit(make_plan(recipe), RunOptions(), output.append)
    assert fake.calls("scancel") == ["101 102"]
    assert "could not be canceled: 101 102" in output[-1]
    assert newest(run_dir(recipe)) is not None


def test_a_submission_whose_queue_cannot_be_read_stays_incomplete(fake: FakeSlurm, tmp_path: Path) -> None:
    recipe = load_recipe(TOY, _keys(tmp_path, "cluster=slurm"))
    fake.set(
        "sbatch", f'[ -e {tmp_path}/one ] && {{ echo "sbatch: no more" >&2; exit 1; }}; touch {tmp_path}/one; echo 101'
    )
    fake.set("scancel", "exit 0")
    output: list[str] = []
    with pytest.raises(EnvironmentProblem, match="no more"):
        submit.submit(make_plan(recipe), RunOptions(), output.append)
    last = newest(run_dir(recipe))
    assert last is not None
    assert (last.complete, fake.calls("scancel")) == (False, ["101"])
    assert "in the queue is unknown" in output[-1]
