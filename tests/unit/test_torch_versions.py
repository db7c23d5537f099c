"""Differences between versions of torch, with the installed one and with simulated older ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_minitron.backends.megatron.runtime import torch_versions
from nemo_minitron.backends.megatron.runtime.torch_versions import attention

BATCH, HEADS, TOKENS, HEAD_DIM = 2, 6, 40, 8


@pytest.fixture(params=["installed", "2.6"], autouse=True)
def _version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "2.6":
        monkeypatch.setattr(torch_versions, "_VERSION", (2, 6))


def _inputs(groups: int) -> list[Tensor]:
    """Return query, key and value with the strides that they have in Megatron."""
    made = torch.Generator().manual_seed(0)
    return [
        torch.randn(TOKENS, BATCH, heads, HEAD_DIM, dtype=torch.float64, generator=made)
        .permute(1, 2, 0, 3)
        .requires_grad_()
        for heads in (HEADS, groups, groups)
    ]


def _mask(*shape: int) -> Tensor:
    """Return a mask that is True where attention is allowed; every token attends to itself."""
    made = torch.Generator().manual_seed(1)
    return (torch.rand(*shape, TOKENS, TOKENS, generator=made) < 0.5) | torch.eye(TOKENS, dtype=torch.bool)


MASKS = {"causal": None, "of_all": _mask(), "of_one_sequence": _mask(1, 1), "of_each_sequence": _mask(BATCH, 1)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_the_heads_of_a_group_share_its_keys_and_values(groups: int, mask: str) -> None:
    may_look, inputs = MASKS[mask], _inputs(groups)
    found = attention(*inputs, may_look, causal=may_look is None)
    again = _inputs(groups)
    query, key, value = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in again)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=may_look, is_causal=may_look is None)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(inputs, again, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_no_scores_are_kept_for_the_backward_pass() -> None:
    """The planner does not count these scores."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(*_inputs(2), None, causal=True)
    assert kept
    assert max(kept) <= BATCH * HEADS * TOKENS * HEAD_DIM
