#!/usr/bin/env bash
# Run a recipe on this machine, each stage in its docker image from configs/cluster/dgx.yaml.
#   launchers/dgx.sh RECIPE [key=value ...]        first: docker build --target core -t nemo-minitron:core .
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
# The path of a recipe may be relative to the folder of the call.
if [ "$here" != "$PWD" ] && [ -f "$here/${1-}" ]; then
    set -- "$here/$1" "${@:2}"
fi
exec "${VENV:-.venv}/bin/minitron" launch "$@" cluster=dgx
