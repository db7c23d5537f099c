"""Random output of Slurm's programs gives the right ids and states or a MinitronError, never wrong ones."""

from __future__ import annotations

import re
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.launch.base import UNKNOWN
from nemo_minitron.launch.slurm import answers
from nemo_minitron.launch.slurm import client as slurm
from tests.support.examples import budget

TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
WORDS = st.sampled_from(
    [
        "Welcome to Stampede3",
        "--> Verifying valid submit host...OK",
        "2 node hours will be charged",
        "CLUSTER: alps",
        "sbatch: warning: can't honor --ntasks-per-node",
        "\x1b[1;31mMaintenance on 2026-12-01\x1b[0m",
        "JOBID|STATE|REASON|TIME|LEFT|NODES|RESTARTS",
        "a|b|c|d|e|f|g|h",
        "|||||||",
        "slurm_load_jobs error: Socket timed out",
        "1.5",
        "12 13",
        "",
        "   ",
    ]
)
NOISE = st.lists(TEXT | WORDS, max_size=4)
ID = st.integers(1, 10**10).map(str)
CLUSTER = st.none() | st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,8}", fullmatch=True)
DRESS = st.sampled_from(["{}", "  {}  ", "{}\r", "\x1b[32m{}\x1b[0m"])
STATE = st.sampled_from(
    ["PENDING", "RUNNING", "COMPLETING", "COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"]
)
SUFFIX = st.sampled_from(["", " by 1000", "+", " (Priority)", "*"])
FAILURE = st.sampled_from(
    ["slurm_load_jobs error: Invalid job id specified", "Socket timed out", "", "Zugriff verweigert"]
)


def _is_id(line: str) -> bool:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
    return re.fullmatch(r"(Submitted batch job )?[0-9]+(;\S+| on cluster \S+)?", plain, re.ASCII) is not None


@budget(60)
@given(before=NOISE, after=NOISE, number=ID, cluster=CLUSTER, dress=DRESS)
def test_sbatchs_id_is_found_in_any_text_around_it(
    before: list[str], after: list[str], number: str, cluster: str | None, dress: str
) -> None:
    after = [line for text in after for line in re.split(r"[\r\n]", text) if not _is_id(line)]
    # An escape sequence that the noise leaves open may swallow what follows it.
    noise = [
        text
        for text in [*before, *after]
        if not re.search(r"[\x1b]", text) or text in ("\x1b[1;31mMaintenance on 2026-12-01\x1b[0m",)
    ]
    before = [text for text in before if text in noise]
    after = [text for text in after if text in noise]
    whole = answers.with_cluster(number, cluster)
    output = "\n".join([*before, dress.format(whole), *after])
    with patch.object(slurm, "_run", lambda words: (0, output, "") if words[0] == "sbatch" else (1, "", "")):
        assert slurm.submit(["sbatch", "/x.sh"], lambda text: None) == whole


@budget(60)
@given(noise=NOISE)
def test_output_without_an_id_is_an_error(noise: list[str]) -> None:
    output = "\n".join(line for text in noise for line in re.split(r"[\r\n]", text) if not _is_id(line))
    answered = patch.object(slurm, "_run", lambda words: (0, output, "") if words[0] == "sbatch" else (1, "", ""))
    with answered, pytest.raises(EnvironmentProblem, match="no line with a job id"):
        slurm.submit(["sbatch", "/x.sh"], lambda text: None)


@budget(60)
@given(
    noise=NOISE,
    number=ID,
    tasks=st.dictionaries(st.integers(0, 3000), st.tuples(STATE, SUFFIX), max_size=5),
    other=ID,
    order=st.randoms(use_true_random=False),
)
def test_states_are_those_of_the_job_only(
    noise: list[str], number: str, tasks: dict[int, tuple[str, str]], other: str, order: object
) -> None:
    mine = [f"{number}_{index}|{state}{suffix}|None|0:01|1:00|n1|0|" for index, (state, suffix) in tasks.items()]
    rows = [*mine, *([] if other == number else [f"{other}|RUNNING|None|0:01|1:00|n1|0|"])]
    order.shuffle(rows)  # type: ignore[attr-defined]
    noise = [text for text in noise if not text.startswith(number) and "\x1b" not in text]
    output = "\n".join([*noise, *rows, *noise])
    found = {state.job_id: state.state for state in answers.job_states(output, number)}
    assert found == {f"{number}_{index}": state for index, (state, _) in tasks.items()}


@budget(60)
@given(code=st.sampled_from([0, 1, 124]), noise=NOISE, error=FAILURE, number=ID)
def test_a_job_is_gone_only_if_slurm_reports_it(code: int, noise: list[str], error: str, number: str) -> None:
    output = "\n".join(noise)
    with patch.object(slurm, "_run", lambda words: (code, output, error)), patch("shutil.which", lambda name: None):
        (state,) = slurm.states([number])[number][:1]
    if code and "Invalid job id" not in error:
        assert state.state == UNKNOWN
    assert state.job_id.startswith(number)


@budget(60)
@given(noise=NOISE, limit=st.integers(1, 9999), gpus=st.integers(0, 16), nodes=st.integers(1, 999), kind=TEXT)
def test_partitions_are_read_out_of_any_text(noise: list[str], limit: int, gpus: int, nodes: int, kind: str) -> None:
    name = "gpu-a100"
    gres = f"gpu:a100:{gpus}(S:0-1)" if gpus else "(null)"
    noise = [text for text in noise if name not in text and "\x1b" not in text]
    line = f"{name}|up|{limit // 60}:{limit % 60:02d}:00|{gres}|{nodes}|64|512000+|mix-"
    found = answers.partitions("\n".join([*noise, line, *noise]))
    part = found[name]
    assert (part.is_up, part.limit_min, part.gpus, part.nodes, part.usable) == (True, limit, gpus, nodes, nodes)
    answers.partitions(f"{kind}|{kind}|{kind}|{kind}|{kind}")
    answers.default_partition(kind)
