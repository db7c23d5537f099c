"""Documents that are packed into one sample do not see each other, where the recipe asks for it."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_minitron.backends.megatron.datasets import mask_between_documents
from nemo_minitron.backends.megatron.forward import evaluating, model_logits
from nemo_minitron.backends.megatron.session import open_session
from nemo_minitron.backends.megatron.weights import load_model
from nemo_minitron.config.schema import Parallel
from tests.support.tiny_models import tiny_model_dir

EOD = 0


def test_the_mask_is_causal_within_documents() -> None:
    mask = mask_between_documents(torch.tensor([[5, 6, EOD, 7]]), EOD)
    assert (~mask[0, 0]).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


@torch.no_grad()
def test_each_document_has_the_logits_that_it_has_alone(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama_gqa_tied")
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(1, 512, (1, size), generator=generator) for size in (11, 20))
    packed = torch.cat([first, torch.tensor([[EOD]]), second], 1)
    with open_session(Parallel(), device="cpu", threads=1) as session:
        model, _ = load_model(folder, session, precision="fp32", seq_len_tokens=32)
        with evaluating(model):
            masked = model_logits(model, {"tokens": packed, "attention_mask": mask_between_documents(packed, EOD)})
            open_ = model_logits(model, {"tokens": packed})
            alone = [model_logits(model, {"tokens": tokens}) for tokens in (first, second)]
    torch.testing.assert_close(masked[:, :11], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(masked[:, 12:], alone[1], rtol=1e-5, atol=1e-5)
    assert (open_[:, 12:] - alone[1]).abs().max() > 0.1, "without the mask the first document is seen"
