#!/bin/bash
# Server of ppo_actor.yaml at port 5556; runs until it is stopped.
set -euo pipefail
export NEMO_ALIGNER_HOME="${NEMO_ALIGNER_HOME:-/opt/NeMo-Aligner}" HYDRA_FULL_ERROR=1
export PYTHONPATH="${NEMO_ALIGNER_HOME}:${PYTHONPATH:-}"
cd /shared/runs/llama31_8b/width_4b_instruct/rlhf_several_nodes
exec srun --nodes=2 --ntasks-per-node=8 python -u "${NEMO_ALIGNER_HOME}/examples/nlp/gpt/serve_ppo_critic.py" --config-path=/shared/runs/llama31_8b/width_4b_instruct/rlhf_several_nodes --config-name=ppo_critic
