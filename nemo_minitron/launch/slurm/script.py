"""The sbatch script of a job. Pure: the same job gives the same text; every value is quoted.

The script decides what happens after the stage: done, failed, or retried in another job. It decides by files, never by
exit codes, which launchers of processes do not pass on: a stage has finished when its manifest exists. It is bash, not
Python, for the reasons in docs/ARCHITECTURE.md, section Launchers.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_minitron.artifacts.run_paths import LOGS, SLURM_LOGS
from nemo_minitron.launch.containers import (
    HOST_VARIABLES,
    bind,
    folders_to_make,
    image_name,
    inside,
    mounts_of,
)
from nemo_minitron.launch.context import PROGRAM, JobContext, JobFolders
from nemo_minitron.launch.jobs import Environment, Job
from nemo_minitron.processes.nodes import PORTS
from nemo_minitron.schema.cluster import Cluster

CLEAN = """\
# Steps take their memory, binding and environment from this job, not from a job that submitted it.
unset "${!SRUN_@}" "${!SBATCH_@}" "${!SALLOC_@}" "${!SLURM_MEM_PER_@}" "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" \\
    SLURM_EXPORT_ENV "${!PMI@}" "${!OMPI_@}" "${!TORCHELASTIC_@}" \\
    RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT \\
    MINITRON_NODES MINITRON_SERVER_NODES MINITRON_RENDEZVOUS MINITRON_ATTEMPT MINITRON_AGENT
"""

PRELUDE = """\
run={run}
launch={launch}
stages=({stages})
stage=${{stages[${{SLURM_ARRAY_TASK_ID:-0}}]}}
work="$run/.work/$stage"
restarts=${{SLURM_RESTART_COUNT:-0}}
id=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
id=${{id:-$SLURM_JOB_ID}}
export MINITRON_STOP_FILE="$launch/$stage.stop"
export MINITRON_FAILED_FILE="$launch/$stage.failed"
export MINITRON_INTERRUPTED_FILE="$launch/$stage.interrupted"
export MINITRON_DIED_FILE="$launch/$stage.died"

say() {{ printf '%s minitron: job %s, restart %s, %s: %s\\n' "$(date '+%F %T')" "$id" "$restarts" "$stage" "$1"; }}
is_done() {{ [ -f "$run/$stage/manifest.json" ]; }}
# What the stage has saved so far: the names of checkpoints, shards and layers, and the number of finished batches.
# Nothing, whether the work folder exists or not, has one checksum.
saved() {{
    {{
        cd -- "$work" && {{
            find . \\( -name '*.distcp' -o -name '*.safetensors' -o -name '*.shard.json' \\
                -o -path './teacher_logits/*.jsonl' \\) -not -path '*partial*' | sort
            find . -name '*.batches.jsonl' -exec wc -l {{}} + | grep -v '^ *0 ' | sort
        }}
    }} 2>/dev/null | cksum
}}

# Slurm sends SIGTERM to the stage, not to this script, when it preempts the job with a grace time. srun sends it, too,
# when processes on another node than the first have died.
is_preempted() {{
    [ -e "$MINITRON_INTERRUPTED_FILE" ] && [ ! -e "$MINITRON_STOP_FILE" ] && [ ! -e "$MINITRON_DIED_FILE" ]
}}

if is_done; then say 'has already finished'; exit 0; fi
if [ -e "$MINITRON_FAILED_FILE" ]; then say "failed before: $(cat -- "$MINITRON_FAILED_FILE")"; exit 1; fi
rm -f -- "$MINITRON_STOP_FILE" "$MINITRON_INTERRUPTED_FILE" "$MINITRON_DIED_FILE"
before=$(saved)
# The time limit is near: the stage finds this file, writes a checkpoint and exits.
trap 'printf SIGUSR1 >"$MINITRON_STOP_FILE"; say "the time limit is near: requested a checkpoint"' USR1
say "starts on $SLURM_JOB_NODELIST"
"""

HOST_PATHS = f"""\
# Paths of the host, which the image does not have.
unset {" ".join(HOST_VARIABLES)}
"""

SEVERAL_NODES = """\
# The names are the last lines; the banner of a site would come before them.
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n "$SLURM_JOB_NUM_NODES" | head -n 1)
if [ -z "$host" ]; then say "scontrol does not name the nodes of $SLURM_JOB_NODELIST"; exit 1; fi
export MINITRON_NODES="$SLURM_JOB_NUM_NODES"
export MINITRON_SERVER_NODES={server_nodes}
export MINITRON_RENDEZVOUS="$host:$(({first_port} + SLURM_JOB_ID % {num_ports}))"
export MINITRON_ATTEMPT="$SLURM_JOB_ID-$restarts"
"""

WAIT = """\
step=$!
# A trapped signal ends `wait` early.
while :; do
    wait "$step"
    kill -0 "$step" 2>/dev/null || break
done

if is_done; then say 'finished'; exit 0; fi
if [ -e "$MINITRON_FAILED_FILE" ]; then say "failed: $(cat -- "$MINITRON_FAILED_FILE")"; exit 1; fi
if [ -e "$run/STOP" ]; then say "stopped by $run/STOP"; exit 1; fi
if [ "$(saved)" = "$before" ] && ! is_preempted; then
    say 'ended and has saved nothing new in this job: not retried' | tee "$MINITRON_FAILED_FILE"
    exit 1
fi
if [ "$restarts" -ge {max_restarts} ]; then
    say 'has been restarted {max_restarts} times: not retried' | tee "$MINITRON_FAILED_FILE"
    exit 1
fi
"""

REQUEUE = """\
say 'continues in the next job'
for _ in 1 2 3 4 5 6; do
    scontrol requeue "$id" && sleep 600
    sleep 20
done
say 'could not be requeued'
exit 1
"""

LINK = """\
if [ "${MINITRON_LAST_LINK:-no}" = yes ]; then
    say 'was the last link of its chain: launch again, or raise execution.cluster.links'
    exit 1
fi
say 'continues in the next link of its chain'
exit 0
"""


def render_script(job: Job, cluster: Cluster, context: JobContext) -> str:
    """Return the whole script."""
    in_container = cluster.container.runtime != "none"
    quoted_stages = " ".join(shlex.quote(stage) for stage in job.stages)
    parts = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in sbatch_options(job, cluster, context)),
        "set -uo pipefail",
        f"cd -- {_quote(context.folders.cwd)} || exit 1",
        CLEAN + (HOST_PATHS if in_container else ""),
        *_setup(cluster, context),
        PRELUDE.format(run=_quote(context.run_dir), launch=_quote(context.launch_dir), stages=quoted_stages),
    ]
    if job.nodes > 1:
        several = {"first_port": PORTS.start, "num_ports": len(PORTS), "server_nodes": job.server_nodes}
        parts.append(SEVERAL_NODES.format(**several))
    if in_container:
        parts.append(f"mkdir -p -- {' '.join(_quote(folder) for folder in folders_to_make(context.folders))}")
    parts += [f"{_srun(job, cluster, context)} &", WAIT.format(max_restarts=job.resources.max_restarts)]
    parts.append(REQUEUE if cluster.requeue else LINK)
    return "\n".join(parts)


def sbatch_options(job: Job, cluster: Cluster, context: JobContext) -> Iterator[str]:
    """Yield the options without paths; an #SBATCH line cannot quote paths, so they are words of the sbatch command."""
    resources = job.resources
    yield f"--job-name={job_name(context.recipe_name, job.name)}"
    yield f"--nodes={job.nodes}"
    yield "--ntasks-per-node=1"
    optional = {
        "partition": resources.partition,
        "account": cluster.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "reservation": cluster.reservation,
        "time": resources.time_min,
        "cpus-per-task": resources.cpus_per_node,
        "mem": _memory(resources.mem_gib),
    }
    yield from (f"--{name}={value}" for name, value in optional.items() if value is not None)
    if resources.gpus_per_node and cluster.gpu_option == "gpus-per-node":
        yield f"--gpus-per-node={resources.gpus_per_node}"
    elif resources.gpus_per_node and cluster.gpu_option == "gres":
        yield f"--gres=gpu:{resources.gpus_per_node}"
    if job.is_exclusive(cluster):
        yield "--exclusive"
    if job.is_array:
        limit = f"%{cluster.array_limit}" if cluster.array_limit else ""
        yield f"--array=0-{len(job.stages) - 1}{limit}"
    yield "--requeue" if cluster.requeue else "--no-requeue"
    yield "--open-mode=append"
    yield f"--signal=B:USR1@{cluster.grace_s}"
    yield from cluster.sbatch


def _memory(mem_gib: int | None) -> str | None:
    if mem_gib is None:
        return None
    return f"{mem_gib}G" if mem_gib else "0"


def sbatch_command(
    job: Job, context: JobContext, *, after: Sequence[str], any_end: bool = False, export: str = ""
) -> list[str]:
    """Return the command that submits the job.

    Args:
        after: ids of jobs that it depends on.
        any_end: wait until they end, whether or not they succeed.
        export: `NAME=value` that the script gets in addition to the environment of the call.
    """
    log = f"{context.run_dir}/{LOGS}/{SLURM_LOGS}/{job.name}-{'%A_%a' if job.is_array else '%j'}.log"
    path = str(context.run_dir).replace("%", "%%")
    words = ["sbatch", "--parsable", f"--output={log.replace(str(context.run_dir), path, 1)}"]
    words += [f"--chdir={context.folders.cwd}"]
    if after:
        words += [f"--dependency={'afterany' if any_end else 'afterok'}:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    if export:
        words.append(f"--export=ALL,{export}")
    return [*words, str(script_file(job, context))]


def script_file(job: Job, context: JobContext) -> Path:
    """Return the file of the job's script."""
    return context.launch_dir / f"{job.name}.sh"


def job_name(recipe_name: str, job: str) -> str:
    """Return the name that Slurm shows."""
    return f"{recipe_name.replace('/', '.')}.{job}"


def srun_options(cluster: Cluster, environment: Environment, folders: JobFolders) -> list[str]:
    """Return the options of srun for pyxis; none for other runtimes."""
    container = cluster.container
    if container.runtime != "pyxis":
        return []
    return [
        f"--container-image={image_name(container, environment, folders)}",
        f"--container-mounts={','.join(bind(mount) for mount in mounts_of(container, folders))}",
        f"--container-workdir={folders.cwd}",
        "--no-container-mount-home",
    ]


def _setup(cluster: Cluster, context: JobContext) -> Iterator[str]:
    site = [(f"module load {shlex.quote(module)}", f"module {module}") for module in cluster.modules]
    if cluster.setup_script is not None:
        file = context.folders.cwd / cluster.setup_script
        site.insert(0, (f"# shellcheck disable=SC1090,SC1091\n. {_quote(file)}", str(file)))
    if site:
        yield "# Scripts of a site may read unset variables, and change options of this shell.\nset +u"
        for command, name in site:
            message = f"printf 'minitron: %s failed with exit code %s\\n' {_quote(name)} \"$?\""
            yield f"{command} || {{ {message}; exit 1; }}"
        yield "set +e -uo pipefail"
    if cluster.environment:
        yield f"# Sets {', '.join(cluster.environment)}; their values are in no script."
        yield f"# shellcheck disable=SC1090,SC1091\n. {_quote(context.folders.environment_file)} || exit 1"
    if cluster.agent != "torchrun":
        yield f"export MINITRON_AGENT={shlex.quote(cluster.agent)}"


def _srun(job: Job, cluster: Cluster, context: JobContext) -> str:
    program = context.program if cluster.container.runtime == "none" else [cluster.command or PROGRAM]
    # The stage is a variable of the script, because all tasks of an array share one script.
    command = inside([*program, "stage", str(context.recipe_file)], cluster, job.environment, context.folders)
    words = ["srun", f"--nodes={job.nodes}", f"--ntasks={job.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    words += [f"--cpus-per-task={job.resources.cpus_per_node}"] if job.resources.cpus_per_node else ["--cpu-bind=none"]
    words += [*srun_options(cluster, job.environment, context.folders), *command]
    return " \\\n    ".join(shlex.quote(word) for word in words) + ' \\\n    "$stage"'


def _quote(path: Path | str) -> str:
    return shlex.quote(str(path))
