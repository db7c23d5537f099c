#!/bin/bash
# Training. Start it beside server.sh, here or on other nodes; it waits for the server.
set -euo pipefail
export NEMO_ALIGNER_HOME="${NEMO_ALIGNER_HOME:-/opt/NeMo-Aligner}" HYDRA_FULL_ERROR=1
export PYTHONPATH="${NEMO_ALIGNER_HOME}:${PYTHONPATH:-}"
cd /shared/runs/llama31_8b/width_4b_instruct/rlhf_reinforce
export NCCL_ALGO=Tree  # two passes with the same weights give the same log-probabilities
until (exec 3<>/dev/tcp/node7/5556) 2>/dev/null; do
  echo 'waiting for the server'
  sleep 10
done
exec mpirun -n 8 --allow-run-as-root python -u "${NEMO_ALIGNER_HOME}/examples/nlp/gpt/train_gpt_reinforce_actor.py" --config-path=/shared/runs/llama31_8b/width_4b_instruct/rlhf_reinforce --config-name=reinforce_actor
