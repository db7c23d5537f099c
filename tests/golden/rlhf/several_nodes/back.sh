#!/bin/bash
# Conversion of the trained model to a Hugging Face folder.
set -euo pipefail
export NEMO_ALIGNER_HOME="${NEMO_ALIGNER_HOME:-/opt/NeMo-Aligner}" HYDRA_FULL_ERROR=1
export PYTHONPATH="${NEMO_ALIGNER_HOME}:${PYTHONPATH:-}"
cd /shared/runs/llama31_8b/width_4b_instruct/rlhf_several_nodes
exec minitron convert /shared/runs/llama31_8b/width_4b_instruct/rlhf_several_nodes/actor/checkpoints/ppo_actor.nemo /shared/runs/llama31_8b/width_4b_instruct/rlhf_several_nodes/trained --like /shared/runs/llama31_8b/width_4b_instruct/export
