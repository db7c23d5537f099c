"""The indices of a teacher that NVIDIA's ModelOpt keeps. test_modelopt.py runs this where nvidia-modelopt is installed.

    python modelopt_side.py MODEL_DIR BATCHES.safetensors TARGET.json OUT.json

Scores, order and cut are ModelOpt's own (`mtp.prune`, mode `mcore_minitron`); this file only builds the model, feeds
the batches, and finds each column of the pruned weights in the teacher's weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import modelopt.torch.prune as mtp
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from modelopt.torch.nas.modules import _DynamicLayerNorm
from modelopt.torch.nas.registry import DMRegistry
from modelopt.torch.nas.traced_hp import TracedHp
from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config
from safetensors.torch import load_file
from torch import Tensor

from nemo_minitron.backends.megatron.model import layers
from nemo_minitron.backends.megatron.model.forward import forward_batches
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.session import Session, open_session
from nemo_minitron.schema.execution import Parallel


# ModelOpt knows the norms of Transformer Engine and Apex; neither is there on a CPU.
@DMRegistry.register({layers.TorchNorm: "nemo_minitron.backends.megatron.model.layers.TorchNorm"})
class DynamicTorchNorm(_DynamicLayerNorm):
    """TorchNorm as a dynamic module, which is cut with the hidden size."""

    def _setup(self, *, num_features: TracedHp) -> None:
        # As ModelOpt's _DynamicFusedLayerNorm, but that norm also stores its size; ours does not.
        self._register_hparam("num_features", num_features)
        self._register_dynamic_attribute("weight", self._cut_to_active_features)
        self._register_dynamic_attribute("bias", self._cut_to_active_features)


def main(model_dir: Path, batches_file: Path, target_file: Path, out_file: Path) -> None:
    tokens = list(load_file(batches_file).values())
    target: dict[str, int] = json.loads(target_file.read_text())
    with (
        # ModelOpt converts Megatron's and Transformer Engine's attention only.
        patch.object(layers, "SdpaCoreAttention", DotProductAttention),
        open_session(Parallel(), device="cpu", threads=1) as session,
    ):
        model, _ = load_model(model_dir, session, precision="fp32", seq_len_tokens=tokens[0].shape[1])
        teacher = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        student = _prune(model, tokens, target, session)
        kept = _kept(teacher, student, kv_channels=model.config.kv_channels)
    out_file.write_text(json.dumps(kept))


def _prune(model: GPTModel, tokens: Iterable[Tensor], target: dict[str, int], session: Session) -> dict[str, Tensor]:
    """Return the weights of the model that ModelOpt makes."""
    # The divisors only restrict which sizes can be requested; ModelOpt's own are of large models.
    config = get_mcore_minitron_config(hidden_size_divisor=1, ffn_hidden_size_divisor=1, num_layers_divisor=1)
    batches = [{"tokens": batch} for batch in tokens]
    pruned, _ = mtp.prune(
        model,
        mode=[("mcore_minitron", config)],
        constraints={"export_config": target},
        dummy_input=None,
        config={"forward_loop": lambda dynamic: forward_batches(dynamic, batches, session, lambda *_: None)},
    )
    return dict(pruned.named_parameters())


def _kept(teacher: dict[str, Tensor], student: dict[str, Tensor], kv_channels: int) -> dict[str, Any]:
    """Return the kept indices, most important first: ModelOpt sorts before it cuts."""
    norm = "decoder.final_layernorm.weight"
    hidden = _find(student[norm][None], teacher[norm][None])
    ffn, heads = [], []
    for layer in range(sum(name.endswith("linear_fc2.weight") for name in teacher)):
        fc2 = f"decoder.layers.{layer}.mlp.linear_fc2.weight"
        proj = f"decoder.layers.{layer}.self_attention.linear_proj.weight"
        ffn.append(_find(student[fc2], teacher[fc2][hidden]))
        channels = _find(student[proj], teacher[proj][hidden])
        heads.append([channel // kv_channels for channel in channels[::kv_channels]])
    return {"hidden": hidden, "ffn": ffn, "heads": heads}


def _find(columns_RC: Tensor, among_RD: Tensor) -> list[int]:
    """Return the index of each column in `among`, which has every column exactly once."""
    matches_CD = (columns_RC[:, :, None] == among_RD[:, None, :]).all(0)
    if not bool((matches_CD.sum(1) == 1).all()):
        raise AssertionError("a column of the pruned model is not one column of the teacher")
    return matches_CD.int().argmax(1).tolist()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
