#!/bin/bash
#SBATCH --job-name=llama31_8b.width_4b.distill
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1
#SBATCH --partition=batch
#SBATCH --account=llm
#SBATCH --time=240
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -uo pipefail
cd -- /shared/checkout || exit 1
# Steps take their memory, binding and environment from this job, not from a job that submitted it.
unset "${!SRUN_@}" "${!SBATCH_@}" "${!SALLOC_@}" "${!SLURM_MEM_PER_@}" "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" \
    SLURM_EXPORT_ENV "${!PMI@}" "${!OMPI_@}" "${!TORCHELASTIC_@}" \
    RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT \
    MINITRON_NODES MINITRON_SERVER_NODES MINITRON_RENDEZVOUS MINITRON_ATTEMPT MINITRON_AGENT

run=/shared/runs/llama31_8b/width_4b
launch=/shared/runs/llama31_8b/width_4b/launch/001
stages=(distill)
stage=${stages[${SLURM_ARRAY_TASK_ID:-0}]}
work="$run/.work/$stage"
restarts=${SLURM_RESTART_COUNT:-0}
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
id=${id:-$SLURM_JOB_ID}
export MINITRON_STOP_FILE="$launch/$stage.stop"
export MINITRON_FAILED_FILE="$launch/$stage.failed"
export MINITRON_INTERRUPTED_FILE="$launch/$stage.interrupted"
export MINITRON_DIED_FILE="$launch/$stage.died"

say() { printf '%s minitron: job %s, restart %s, %s: %s\n' "$(date '+%F %T')" "$id" "$restarts" "$stage" "$1"; }
is_done() { [ -f "$run/$stage/manifest.json" ]; }
# What the stage has saved so far: the names of checkpoints, shards and layers, and the number of finished batches.
# Nothing, whether the work folder exists or not, has one checksum.
saved() {
    {
        cd -- "$work" && {
            find . \( -name '*.distcp' -o -name '*.safetensors' -o -name '*.shard.json' \
                -o -path './teacher_logits/*.jsonl' \) -not -path '*partial*' | sort
            find . -name '*.batches.jsonl' -exec wc -l {} + | grep -v '^ *0 ' | sort
        }
    } 2>/dev/null | cksum
}

# Slurm sends SIGTERM to the stage, not to this script, when it preempts the job with a grace time. srun sends it, too,
# when processes on another node than the first have died.
is_preempted() {
    [ -e "$MINITRON_INTERRUPTED_FILE" ] && [ ! -e "$MINITRON_STOP_FILE" ] && [ ! -e "$MINITRON_DIED_FILE" ]
}

if is_done; then say 'has already finished'; exit 0; fi
if [ -e "$MINITRON_FAILED_FILE" ]; then say "failed before: $(cat -- "$MINITRON_FAILED_FILE")"; exit 1; fi
rm -f -- "$MINITRON_STOP_FILE" "$MINITRON_INTERRUPTED_FILE" "$MINITRON_DIED_FILE"
before=$(saved)
# The time limit is near: the stage finds this file, writes a checkpoint and exits.
trap 'printf SIGUSR1 >"$MINITRON_STOP_FILE"; say "the time limit is near: requested a checkpoint"' USR1
say "starts on $SLURM_JOB_NODELIST"

# The names are the last lines; the banner of a site would come before them.
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n "$SLURM_JOB_NUM_NODES" | head -n 1)
if [ -z "$host" ]; then say "scontrol does not name the nodes of $SLURM_JOB_NODELIST"; exit 1; fi
export MINITRON_NODES="$SLURM_JOB_NUM_NODES"
export MINITRON_SERVER_NODES=0
export MINITRON_RENDEZVOUS="$host:$((20000 + SLURM_JOB_ID % 12000))"
export MINITRON_ATTEMPT="$SLURM_JOB_ID-$restarts"

srun \
    --nodes=32 \
    --ntasks=32 \
    --ntasks-per-node=1 \
    --kill-on-bad-exit=1 \
    --cpu-bind=none \
    /shared/venv/bin/minitron \
    stage \
    /shared/runs/llama31_8b/width_4b/launch/001/recipe.json \
    "$stage" &
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
if [ "$restarts" -ge 50 ]; then
    say 'has been restarted 50 times: not retried' | tee "$MINITRON_FAILED_FILE"
    exit 1
fi

say 'continues in the next job'
for _ in 1 2 3 4 5 6; do
    scontrol requeue "$id" && sleep 600
    sleep 20
done
say 'could not be requeued'
exit 1
