#!/usr/bin/env bash
# A shell in the image, with the GPUs and this folder.
#   launchers/shell.sh                              docker, on this machine
#   launchers/shell.sh slurm [srun options ...]     pyxis, on a node: launchers/shell.sh slurm -p interactive --gpus=1
set -euo pipefail
cd "$(dirname "$0")/.."
image=${IMAGE:-nemo-minitron:core}
if [ "${1:-docker}" = slurm ]; then
    shift
    exec srun --pty "--container-image=$image" "--container-mounts=$PWD:$PWD" "--container-workdir=$PWD" "$@" bash
fi
exec docker run --rm --init --interactive --tty --gpus=all --ipc=host --ulimit=memlock=-1 --ulimit=stack=67108864 \
    "--user=$(id -u):$(id -g)" --env=HOME=/tmp "--volume=$PWD:$PWD" "--workdir=$PWD" "$image" bash
