#!/bin/bash
# Training. Start it beside server.sh, here or on other nodes; it waits for the server.
set -euo pipefail
export NEMO_ALIGNER_HOME="${NEMO_ALIGNER_HOME:-/opt/NeMo-Aligner}" HYDRA_FULL_ERROR=1
export PYTHONPATH="${NEMO_ALIGNER_HOME}:${PYTHONPATH:-}"
cd /shared/runs/llama31_8b/width_4b_instruct/rlhf_several_nodes
export NCCL_ALGO=Tree  # two passes with the same weights give the same log-probabilities
until (exec 3<>/dev/tcp/node9/5556) 2>/dev/null; do
  echo 'waiting for the server'
  sleep 10
done
exec srun --nodes=4 --ntasks-per-node=8 python -u "${NEMO_ALIGNER_HOME}/examples/nlp/gpt/train_gpt_ppo_actor.py" --config-path=/shared/runs/llama31_8b/width_4b_instruct/rlhf_several_nodes --config-name=ppo_actor
