"""`minitron check --cluster` and `launch`, with stand-ins for Slurm's programs."""

from __future__ import annotations

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
    return [f"execution.run_root={tmp_path}/runs", "launcher=slurm", *words]


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
    assert "select on gpu: 32 cores of a node, it has 16" in found["problem"]
    assert "select on gpu: 100 GiB of a node, it has 62.5" in found["problem"]
    fake.set("sinfo", SINFO.replace("|idle", "|drain*"))
    assert any(
        "nodes, 0 are up now; the job would wait" in text for text in _found(tmp_path, "cluster=slurm")["warning"]
    )
    fake.set("sinfo", "echo '=== maintenance ==='")
    assert "sinfo names no partition here" in _found(tmp_path, "cluster=slurm")["problem"]


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
