#!/usr/bin/env bash
# Check a recipe, then run it in the environment of `make install`.
#   launchers/local.sh RECIPE [key=value ...]
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
# The path of a recipe may be relative to the folder of the call.
if [ "$here" != "$PWD" ] && [ -f "$here/${1-}" ]; then
    set -- "$here/$1" "${@:2}"
fi
minitron=${VENV:-.venv}/bin/minitron
"$minitron" check "$@"
exec "$minitron" run "$@"
