#!/usr/bin/env bash
# Check a recipe, then run it with the environment that `make install` made.
#   launchers/local.sh RECIPE [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
minitron=${VENV:-.venv}/bin/minitron
"$minitron" check "$@"
exec "$minitron" run "$@"
