"""Calls of Slurm's programs: answers without an id, lost answers, a controller that is away."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.launch.slurm import client as slurm
from tests.support.fake_slurm import CONTROLLER_IS_AWAY, NO_SUCH_JOB, FakeSlurm

SCRIPT = "/runs/toy/launch/001/distill.sh"
SUBMIT = ["sbatch", "--parsable", SCRIPT]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def _submit(known: tuple[str, ...] = ()) -> str:
    return slurm.submit(SUBMIT, lambda text: None, known)


def test_an_id_is_found_with_and_without_a_banner(fake: FakeSlurm) -> None:
    fake.set("sbatch", "echo '101;alps'")
    assert _submit() == "101;alps"
    assert fake.calls("squeue") == []
    fake.set("sbatch", "echo '2 node hours will be charged'; echo '101;alps'")
    assert _submit() == "101;alps"


def test_a_number_in_a_banner_is_no_id_if_the_queue_has_another(fake: FakeSlurm) -> None:
    fake.set("sbatch", "echo 2; echo 'Ihr Auftrag 101 wurde angenommen'")
    fake.set("squeue", f"echo '101|{SCRIPT}'; echo '2|/of/another/run.sh'")
    assert _submit() == "101"


def test_the_queue_decides_between_lines_that_look_like_ids(fake: FakeSlurm) -> None:
    fake.set("sbatch", "echo 4; echo 101; echo 16")
    assert _submit() == "16", "the last one, where the queue is not to be had"
    fake.set("squeue", f"echo '101|{SCRIPT}'; echo '16|/other.sh'")
    assert _submit() == "101"


def test_a_job_whose_id_was_not_printed_is_found_by_its_script_and_canceled(fake: FakeSlurm) -> None:
    fake.set("sbatch", "echo 'Ihr Auftrag wurde angenommen'")
    fake.set("squeue", f"echo '--- welcome ---'; echo '99|{SCRIPT}'; echo '101|{SCRIPT}'; echo '7|/other.sh'")
    fake.set("scancel", "exit 0")
    with pytest.raises(EnvironmentProblem, match=r"Ihr Auftrag.*no line with a job id") as error:
        _submit(known=("99",))
    assert "101 was found in the queue and canceled" in str(error.value)
    assert fake.calls("scancel") == ["101"]


def test_a_job_whose_answer_was_lost_is_not_submitted_a_second_time(fake: FakeSlurm) -> None:
    fake.set("sbatch", 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv" >&2; exit 1')
    fake.set("squeue", f"echo '101|{SCRIPT}'")
    assert _submit() == "101"
    assert len(fake.calls("sbatch")) == 1


def test_a_job_is_submitted_again_only_if_the_queue_answers(fake: FakeSlurm) -> None:
    fake.set("sbatch", 'echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1')
    once = f"if [ -e {fake.folder}/asked ]; then echo '101|{SCRIPT}'; else touch {fake.folder}/asked; exit 1; fi"
    fake.set("squeue", once)
    assert _submit() == "101"
    assert (len(fake.calls("sbatch")), len(fake.calls("squeue"))) == (1, 2)
    fake.set("squeue", CONTROLLER_IS_AWAY)
    with pytest.raises(EnvironmentProblem, match=r"does not say whether the job was created(.|\n)*minitron cancel"):
        _submit()
    assert len(fake.calls("sbatch")) == 2


def test_a_job_that_the_queue_does_not_list_is_submitted_again(fake: FakeSlurm) -> None:
    sent = f"{fake.folder}/sent"
    once = f"if [ -e {sent} ]; then echo 101; else touch {sent}; echo 'Socket timed out' >&2; exit 1; fi"
    fake.set("sbatch", once)
    fake.set("squeue", "echo '7|/other.sh'")
    assert _submit() == "101"
    assert len(fake.calls("sbatch")) == 2


def test_a_refusal_is_reported_in_slurms_words(fake: FakeSlurm) -> None:
    fake.set("sbatch", 'echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1')
    with pytest.raises(EnvironmentProblem, match="invalid partition specified: gpu"):
        _submit()


@pytest.mark.parametrize(
    "answer", [CONTROLLER_IS_AWAY, "exit 1", "sleep 30", 'echo "slurm: munge is down" >&2; exit 1']
)
def test_a_failure_of_squeue_does_not_mean_that_a_job_is_gone(
    answer: str, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.5)
    fake.set("squeue", answer)
    found = slurm.states(["5", "6"])
    assert [found[job_id][0].state for job_id in ("5", "6")] == ["UNKNOWN", "UNKNOWN"]
    assert len(fake.calls("squeue")) == 1, "the rest is not asked"
    with pytest.raises(EnvironmentProblem, match="does not say whether job 5 is still there"):
        slurm.active(["5", "6"], patience_s=0.1)


def test_a_job_is_forgotten_only_if_slurm_reports_an_invalid_id(fake: FakeSlurm) -> None:
    fake.set("squeue", NO_SUCH_JOB)
    assert slurm.states(["5"])["5"][0].state == "FORGOTTEN"
    assert slurm.active(["5"]) == []
    fake.set("sacct", "echo '5|COMPLETED|00:10:00|node1'")
    assert slurm.states(["5"])["5"][0].state == "COMPLETED"
    fake.set("sacct", "echo '5|RUNNING|00:10:00|node1'")
    assert slurm.states(["5"])["5"][0].state == "FORGOTTEN", "accounts of a job that was lost in a crash"


def test_accounts_answer_while_the_controller_is_away(fake: FakeSlurm) -> None:
    fake.set("squeue", CONTROLLER_IS_AWAY)
    fake.set("sacct", "echo '5|RUNNING|00:10:00|node1'")
    assert slurm.active(["5"]) == ["5"]


def test_the_cluster_of_a_job_is_queried_and_kept(fake: FakeSlurm) -> None:
    fake.set("squeue", "echo 'CLUSTER: alps'; echo '5_1|RUNNING|None|1:00|2:00|n1|0|'")
    fake.set("scancel", "exit 0")
    assert slurm.active(["5;alps"]) == ["5_1;alps"]
    assert "--clusters=alps" in fake.calls("squeue")[0]
    slurm.cancel(["5_1;alps", "6"])
    assert fake.calls("scancel") == ["--clusters=alps 5_1", "6"]


def test_canceling_ended_jobs_is_no_error(fake: FakeSlurm) -> None:
    fake.set("scancel", 'echo "scancel: error: Kill job error on job id 5: Invalid job id specified" >&2; exit 1')
    slurm.cancel(["5"])
    fake.set("scancel", 'echo "scancel: error: Kill job error on job id 5: Access/permission denied" >&2; exit 1')
    with pytest.raises(EnvironmentProblem, match="Access/permission denied"):
        slurm.cancel(["5"])


def test_programs_of_slurm_run_in_english_without_an_outer_job(
    fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "4000", "SBATCH_EXPORT": "NONE", "SRUN_CPUS_PER_TASK": "2"}
    outer |= {"SALLOC_PARTITION": "x", "PMIX_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "RANK": "3", "MASTER_PORT": "1"}
    outer |= {"CUDA_VISIBLE_DEVICES": "0", "SQUEUE_FORMAT": "%i", "SQUEUE_USERS": "x", "SCANCEL_INTERACTIVE": "1"}
    outer |= {"TMPDIR": "/tmp/slurm-7"}
    for name, value in {**outer, "LC_ALL": "de_DE.UTF-8", "SLURM_CONF": "/etc/slurm/own.conf"}.items():
        monkeypatch.setenv(name, value)
    fake.set("sbatch", "echo 101")
    fake.set("squeue", NO_SUCH_JOB)
    _submit()
    slurm.states(["5"])
    submitted, requested = fake.environment("sbatch"), fake.environment("squeue")
    assert not set(outer) & (set(submitted) | set(requested))
    assert submitted["SLURM_CONF"] == requested["SLURM_CONF"] == "/etc/slurm/own.conf"
    assert requested["LC_ALL"] == "C"
    # The job keeps the user's encoding; only the messages are English.
    assert (submitted["LC_MESSAGES"], submitted["LC_CTYPE"]) == ("C", "de_DE.UTF-8")
    assert "LC_ALL" not in submitted
