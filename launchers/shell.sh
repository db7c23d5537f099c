#!/usr/bin/env bash
# Open a shell in the image, with the GPUs and this folder.
#   launchers/shell.sh                              docker, on this machine
#   launchers/shell.sh slurm [srun options ...]     pyxis, on a node: launchers/shell.sh slurm -p interactive --gpus=1
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-docker}" = slurm ]; then
    shift
    # The default is a file: pyxis looks up other names on Docker Hub, unless they begin with a registry and #.
    image=${IMAGE:-$PWD/nemo-minitron-core.sqsh}
    exec srun --pty "--container-image=$image" "--container-mounts=$PWD:$PWD" "--container-workdir=$PWD" "$@" bash
fi
image=${IMAGE:-nemo-minitron:core}
exec docker run --rm --init --interactive --tty --gpus=all --ipc=host --ulimit=memlock=-1 --ulimit=stack=67108864 \
    "--user=$(id -u):$(id -g)" --env=HOME=/tmp --env=USER=minitron --env=LOGNAME=minitron --env=HF_TOKEN \
    "--volume=$PWD:$PWD" "--workdir=$PWD" "$image" bash
