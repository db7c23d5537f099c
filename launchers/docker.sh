#!/usr/bin/env bash
# Run a recipe in the image of the Dockerfile; results land in ./runs as the calling user.
#   launchers/docker.sh RECIPE [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
exec docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \
    --user "$(id -u):$(id -g)" -e HOME=/tmp \
    -v "$PWD/runs:/workspace/nemo-minitron/runs" -v "$PWD/assets:/workspace/nemo-minitron/assets" \
    "${IMAGE:-nemo-minitron}" minitron run "$@"
