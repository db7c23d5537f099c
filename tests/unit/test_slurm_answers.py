"""Output of Slurm's programs on real sites, and its parsed form."""

from __future__ import annotations

import pytest

from nemo_minitron.launch.slurm.answers import (
    JobState,
    accounted_states,
    default_partition,
    job_states,
    minutes_of,
    partitions,
    queued_commands,
    submitted_ids,
)

BANNER = "-----\n   Welcome to the Stampede3 Supercomputer\n--> Verifying valid submit host (login4)...OK\n"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("101\n", "101"),
        ("101;alps\n", "101;alps"),
        (f"{BANNER}101\n", "101"),
        ("2 node hours will be charged to account x\n101\n", "101"),
        ("\x1b[32m101\x1b[0m\r\n", "101"),
        ("\x1b]0;login4\x07101\n\n   \n", "101"),
        ("101\nsbatch: INFO: 4 GPUs were added\n", "101"),
        ("Submitted batch job 101\n", "101"),
        ("Submitted batch job 101 on cluster alps\n", "101;alps"),
        ("Envoi du travail 101\n", None),
        ("job 101\n", None),
        ("101 102\n", None),
        ("0\n", None),
        ("-7\n1e5\n1.5\n\u0661\u0662\n", None),
        ("", None),
        (BANNER, None),
    ],
)
def test_the_id_of_a_job_is_the_last_line_that_is_one(answer: str, found: str | None) -> None:
    assert (submitted_ids(answer) or [None])[-1] == found


def test_states_with_suffixes_arrays_and_lines_that_are_no_jobs() -> None:
    squeue = (
        "CLUSTER: alps\n"
        "Welcome | to | the | cluster | of | this | site |\n"
        "123_[4-7:3,9%2]|PENDING|JobArrayTaskLimit|0:00|4:00:00||0|\n"
        "123_3 |RUNNING |None |1:02 |3:58:58 |node[1-2] |2 |\n"
        "123_2|COMPLETING|None|1:02|3:58:58|node3|N/A|\n"
        "12|RUNNING|None|1:02|3:58:58|node4|0|\n"
        "\n"
    )
    found = {state.job_id: state for state in job_states(squeue, "123")}
    assert list(found) == ["123_4", "123_7", "123_9", "123_3", "123_2"]
    assert found["123_9"] == JobState("123_9", "PENDING", "JobArrayTaskLimit", "0:00", "4:00:00")
    assert found["123_3"] == JobState("123_3", "RUNNING", "", "1:02", "3:58:58", "node[1-2]", 2)
    assert found["123_2"].is_active
    words = ("CANCELLED by 1000", "CANCELLED+", "PENDING (Priority)", "OUT_OF_ME+", "REQUEUE_HOLD", "REVOKED")
    states = [job_states(f"7|{word}|None||||0", "7")[0] for word in words]
    assert [state.state for state in states] == [
        "CANCELLED",
        "CANCELLED",
        "PENDING",
        "OUT_OF_MEMORY",
        "REQUEUE_HOLD",
        "REVOKED",
    ]
    assert [state.is_active for state in states] == [False, False, True, False, True, False]


def test_heterogeneous_jobs_and_lists_that_slurm_has_cut_off() -> None:
    assert [state.job_id for state in job_states("123+0|RUNNING|None||||0\n123+1|RUNNING|None||||0", "123")] == [
        "123",
        "123",
    ]
    (cut,) = job_states("123_[1-99999999]|PENDING|None||||0", "123")
    assert cut.job_id == "123_[1-99999999]"
    assert [state.job_id for state in job_states("123_[1,3,...]|PENDING|None||||0", "123")] == ["123_1", "123_3"]


def test_accounts_and_commands() -> None:
    sacct = "JobID|State|Elapsed|NodeList\n7|CANCELLED by 1000|00:01:00|node1\n7.batch|CANCELLED|00:01:00|node1\n"
    assert accounted_states(sacct, "7") == [JobState("7", "CANCELLED", used="00:01:00", nodes="node1")]
    assert queued_commands("Hello|you\n7|/runs/a b/launch/001/x.sh\n8|(null)\n") == [
        ("7", "/runs/a b/launch/001/x.sh"),
        ("8", "(null)"),
    ]


def test_partitions_with_banners_states_and_gpus_of_all_kinds() -> None:
    sinfo = (
        "PARTITION|AVAIL|TIMELIMIT|GRES|NODES|CPUS|MEMORY|STATE\n"
        "Maintenance on Monday | see the wiki | please | be | patient\n"
        "batch|up|4:00:00|gpu:a100:8(S:0-1),nvme:1|30|128|1031000|mix-\n"
        "batch|up|4:00:00|gpu:4(S:0,2)|2|64+|515000+|drain~\n"
        "mig|up|1-00:00:00|gpu:1g.10gb:7,gpu:a100:1|1|32|1000|idle*\n"
        "debug|down|infinite|(null)|1|8|1000|down*\n"
    )
    found = partitions(sinfo)
    assert sorted(found) == ["batch", "debug", "mig"]
    batch = found["batch"]
    assert (batch.gpus, batch.limit_min, batch.nodes, batch.usable) == (8, 240, 32, 30)
    assert (batch.cpus, batch.mem_mib) == (128, 1031000)
    assert (found["mig"].gpus, found["mig"].limit_min, found["mig"].usable) == (8, 1440, 1)
    assert (found["debug"].is_up, found["debug"].usable) == (False, 0)
    assert default_partition("Welcome!\nbatch\ngpu*\n") == "gpu"
    assert default_partition("***\nbatch\n") is None


def test_times() -> None:
    assert [minutes_of(text) for text in ("30:00", "1-12:30:00", "2-0", "90", "n/a", "UNLIMITED")] == [
        30,
        2190,
        2880,
        90,
        None,
        None,
    ]
    with pytest.raises(ValueError, match="not a time"):
        minutes_of("tomorrow")
