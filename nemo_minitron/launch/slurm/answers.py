"""Parsers for the output of Slurm's programs, which sites extend with banners, colors, header lines and odd states.

Pure functions. A line that does not parse is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from nemo_minitron.launch.base import ENDED, JobState

CONTAINER_OPTION = "--container-image"
"""Option that the pyxis plugin adds to srun."""
PARTITIONS = ("sinfo", "--noheader", "--format=%R|%a|%l|%G|%D|%c|%m|%t")
"""Command that lists the partitions: name, whether it is up, limit, GPUs, nodes, cores, memory, state of the nodes."""
MOST_INDICES = 10_000
"""Job arrays with more indices than this stay one entry."""
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_SUBMITTED = re.compile(
    r"(?:Submitted batch job )?([1-9][0-9]{0,18})(?:;([A-Za-z0-9_.-]+)| on cluster ([A-Za-z0-9_.-]+))?"
)
_JOB = re.compile(r"([1-9][0-9]{0,18})(?:_([0-9]{1,9})|_\[([^\]]*)\]?)?(?:\+[0-9]+)?")
_STATE = re.compile(r"([A-Z][A-Z_]*)")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?::([1-9][0-9]{0,8}))?)?")
_GPUS = re.compile(r"(?:^|,)\s*(?:gres[/:])?gpu(?::[^:,()]+)?:([0-9]{1,6})(?=[(,\s]|$)", re.IGNORECASE)
_NODE_SUFFIXES = "*~#!%$@^-+"
UNUSABLE = (
    "down",
    "drain",
    "drained",
    "drng",
    "draining",
    "fail",
    "failing",
    "failg",
    "inval",
    "unk",
    "unknown",
    "error",
)
"""States of nodes that take no job, without the suffix that sinfo adds."""


def has_pyxis(srun_help: str) -> bool:
    """Return whether srun has the options of pyxis, from the output of `srun --help`."""
    return CONTAINER_OPTION in srun_help


@dataclass(frozen=True)
class Partition:
    """A partition as sinfo describes it: its time limit, and the GPUs, cores and memory of its largest node."""

    name: str
    is_up: bool
    limit_min: int | None
    gpus: int
    nodes: int
    cpus: int | None = None
    mem_mib: int | None = None
    usable: int | None = None
    """Nodes that are not down or drained; None where sinfo did not list states."""


def lines_of(text: str) -> list[str]:
    """Return the lines that are not empty, without colors, carriage returns and surrounding blanks."""
    plain = _ANSI.sub("", text).replace("\r", "\n")
    return [line.strip() for line in plain.split("\n") if line.strip()]


def submitted_ids(answer: str) -> list[str]:
    """Return every line of sbatch's output that is a job id, as `NUMBER` or `NUMBER;CLUSTER`."""
    found = [_SUBMITTED.fullmatch(line) for line in lines_of(answer)]
    return [with_cluster(match[1], match[2] or match[3]) for match in found if match]


def split_id(job_id: str) -> tuple[str, str | None]:
    """Split an id into the number of the job and its cluster, if sbatch named one."""
    number, _, cluster = job_id.partition(";")
    return number, cluster or None


def with_cluster(number: str, cluster: str | None) -> str:
    """Join a job number and a cluster; the inverse of `split_id`."""
    return f"{number};{cluster}" if cluster else number


def job_states(answer: str, number: str) -> list[JobState]:
    """Parse the states of job `number` from squeue's lines of `id|state|reason|used|left|nodes|restarts`."""
    return [state for fields in _rows(answer, number, 7) for state in _expanded(fields)]


def accounted_states(answer: str, number: str) -> list[JobState]:
    """Parse the states of job `number` from sacct's lines of `id|state|elapsed|nodes`."""
    rows = _rows(answer, number, 4)
    return [state for job_id, word, used, nodes in rows for state in _expanded([job_id, word, "", used, "", nodes, ""])]


def queued_commands(answer: str) -> list[tuple[str, str]]:
    """Parse (number, command) from squeue's lines of `number|command`."""
    found = [re.fullmatch(r"([1-9][0-9]{0,18})\s*\|\s*(.+)", line) for line in lines_of(answer)]
    return [(match[1], match[2]) for match in found if match]


def _rows(answer: str, number: str, width: int) -> Iterator[list[str]]:
    for line in lines_of(answer):
        fields = [field.strip() for field in line.split("|")]
        job = _JOB.fullmatch(fields[0])
        if len(fields) >= width and job and job[1] == number and _STATE.match(fields[1]):
            yield fields[:width]


def _expanded(fields: list[str]) -> Iterator[JobState]:
    job_id, word, reason, used, left, nodes, restarts = fields
    state, job = _STATE.match(word), _JOB.fullmatch(job_id)
    assert state
    assert job
    number, index, ranges = job[1], job[2], job[3]
    name = _whole_state(state[1].rstrip("_"), word)
    rest = {"reason": "" if reason == "None" else reason, "used": used, "left": left, "nodes": nodes}
    count = int(restarts) if restarts.isascii() and restarts.isdigit() and len(restarts) < 10 else 0
    for one in _indices(ranges) if ranges is not None else [index]:
        yield JobState(f"{number}_{one}" if one is not None else number, name, **rest, restarts=count)


def _whole_state(name: str, word: str) -> str:
    """Complete a state that Slurm has cut off with a `+`, such as OUT_OF_ME+."""
    if f"{name}+" not in word:
        return name
    return next((ended for ended in ENDED if ended.startswith(name)), name)


def _indices(ranges: str) -> list[str]:
    """Expand `4-7,9-13:2%2` to 4 5 6 7 9 11 13; ranges that are cut off with dots or too long stay one entry."""
    found: list[str] = []
    for part in ranges.partition("%")[0].split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        step = int(match[3] or 1)
        if (last - first) // step + len(found) > MOST_INDICES:
            return [f"[{ranges}]"]
        found += [str(index) for index in range(first, last + 1, step)]
    return found or [f"[{ranges}]"]


def partitions(sinfo: str) -> dict[str, Partition]:
    """Parse the output of PARTITIONS; the last three fields may be missing. Keep the maximum over nodes."""
    found: dict[str, Partition] = {}
    for line in lines_of(sinfo):
        part = _partition([word.strip() for word in line.split("|")])
        if part is not None:
            found[part.name] = _joined(found[part.name], part) if part.name in found else part
    return found


def _partition(words: list[str]) -> Partition | None:
    if len(words) < 5 or not re.fullmatch(r"[\w.+-]+\*?", words[0]) or not re.fullmatch(r"[a-z]+", words[1]):
        return None
    name, up, limit, gres, nodes = words[:5]
    try:
        minutes = minutes_of(limit)
    except ValueError:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", nodes):
        return None
    cpus, mem = (_number(words[place]) if len(words) > place else None for place in (5, 6))
    usable = None
    if len(words) > 7:
        usable = 0 if words[7].lower().rstrip(_NODE_SUFFIXES) in UNUSABLE else int(nodes)
    gpus = sum(int(count) for count in _GPUS.findall(gres))
    return Partition(name.rstrip("*"), up == "up", minutes, gpus, int(nodes), cpus, mem, usable)


def _joined(before: Partition, part: Partition) -> Partition:
    return Partition(
        part.name,
        before.is_up or part.is_up,
        None if before.limit_min is None or part.limit_min is None else max(before.limit_min, part.limit_min),
        max(before.gpus, part.gpus),
        before.nodes + part.nodes,
        _most(before.cpus, part.cpus),
        _most(before.mem_mib, part.mem_mib),
        None if before.usable is None or part.usable is None else before.usable + part.usable,
    )


def _number(word: str) -> int | None:
    """Parse `64`, or `64+`, which sinfo prints for the minimum over several nodes."""
    match = re.fullmatch(r"([0-9]{1,12})\+?", word)
    return int(match[1]) if match else None


def _most(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)


def default_partition(sinfo: str) -> str | None:
    """Return the partition that `sinfo --format=%P` marks with a star."""
    names = [line[:-1] for line in lines_of(sinfo) if re.fullmatch(r"[\w.+-]+\*", line)]
    return names[0] if names else None


def minutes_of(limit: str) -> int | None:
    """Convert Slurm's `[days-]hours:minutes:seconds` or `minutes:seconds` to minutes; None for no limit.

    Raises:
        ValueError: the text is not a time.
    """
    if limit.lower() in ("infinite", "unlimited", "n/a", "not_set", "partition_limit"):
        return None
    match = re.fullmatch(r"(?:([0-9]{1,6})-)?([0-9]{1,6}(?::[0-9]{1,2}){0,2})", limit)
    if match is None:
        raise ValueError(f"{limit!r} is not a time in one of Slurm's formats")
    days, clock = match[1], match[2]
    parts = [int(part) for part in clock.split(":")]
    if days:
        parts += [0] * (3 - len(parts))
    elif len(parts) == 1:
        parts += [0]
    seconds = 0
    for part in parts:
        seconds = seconds * 60 + part
    return int(days or 0) * 1440 + seconds // 60
