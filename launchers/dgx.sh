#!/usr/bin/env bash
# Run a recipe on this machine, each stage in its docker image from configs/cluster/dgx.yaml.
#   launchers/dgx.sh RECIPE [key=value ...]        first: docker build --target core -t nemo-minitron:core .
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${VENV:-.venv}/bin/minitron" launch "$@" cluster=dgx
