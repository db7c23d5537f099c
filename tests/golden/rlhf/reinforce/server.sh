#!/bin/bash
# Server of reinforce_actor.yaml at port 5556; runs until it is stopped.
set -euo pipefail
export NEMO_ALIGNER_HOME="${NEMO_ALIGNER_HOME:-/opt/NeMo-Aligner}" HYDRA_FULL_ERROR=1
export PYTHONPATH="${NEMO_ALIGNER_HOME}:${PYTHONPATH:-}"
cd /shared/runs/llama31_8b/width_4b_instruct/rlhf_reinforce
exec python -u "${NEMO_ALIGNER_HOME}/examples/nlp/gpt/serve_reward_model.py" --config-path=/shared/runs/llama31_8b/width_4b_instruct/rlhf_reinforce --config-name=reward_server
