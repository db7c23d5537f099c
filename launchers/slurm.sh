#!/usr/bin/env bash
# Check the cluster, then submit all stages of a recipe that have not finished. Run this on a login node.
#   launchers/slurm.sh CLUSTER RECIPE [key=value ...]        CLUSTER: a file of configs/cluster/, without .yaml
set -euo pipefail
cd "$(dirname "$0")/.."
minitron=${VENV:-.venv}/bin/minitron
cluster=$1
shift
"$minitron" check --cluster "$@" launcher=slurm "cluster=$cluster"
exec "$minitron" launch "$@" launcher=slurm "cluster=$cluster"
