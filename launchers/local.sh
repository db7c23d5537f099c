#!/usr/bin/env bash
# Check a recipe, then run it in the environment of `make install`.
#   launchers/local.sh RECIPE [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
minitron=${VENV:-.venv}/bin/minitron
"$minitron" check "$@"
exec "$minitron" run "$@"
