#!/usr/bin/env bash
# Check the cluster, then submit all stages of a recipe that have not finished. Run this on a login node.
#   launchers/slurm.sh CLUSTER RECIPE [key=value ...]        CLUSTER: a file of configs/cluster/, without .yaml
set -euo pipefail
cluster=$1
shift
here=$PWD
cd "$(dirname "$0")/.."
# The path of a recipe may be relative to the folder of the call.
if [ "$here" != "$PWD" ] && [ -f "$here/${1-}" ]; then
    set -- "$here/$1" "${@:2}"
fi
minitron=${VENV:-.venv}/bin/minitron
"$minitron" check --cluster "$@" launcher=slurm "cluster=$cluster"
exec "$minitron" launch "$@" launcher=slurm "cluster=$cluster"
