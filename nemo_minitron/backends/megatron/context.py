"""Context parallelism: every sequence is split over a group of ranks, as Megatron splits it.

Rank r of cp holds chunks r and 2 * cp - 1 - r of a sequence's 2 * cp chunks, in this order: under causal attention
every rank then has as much to do as the others.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from nemo_minitron.backends.megatron.forward import Batch
from nemo_minitron.backends.megatron.session import Session
from nemo_minitron.backends.megatron.torch_versions import attention


def own_part(batch: Batch, session: Session) -> Batch:
    """This rank's tokens of whole sequences; of an attention mask its rows, which go over all tokens."""
    if session.parallel.cp == 1:
        return batch
    return {key: _own_chunks(value, 2 if key == "attention_mask" else 1, session) for key, value in batch.items()}


def _own_chunks(whole: Tensor, dim: int, session: Session) -> Tensor:
    chunks = whole.unflatten(dim, (2 * session.parallel.cp, -1)).unbind(dim)
    return torch.cat([chunks[session.cp_rank], chunks[-1 - session.cp_rank]], dim)


def own_rows(tensor: Tensor, batch_size: int, session: Session) -> Tensor:
    """Of [B * S, ...] for whole sequences, the rows of this rank's tokens."""
    return own_part({"rows": tensor.unflatten(0, (batch_size, -1))}, session)["rows"].flatten(0, 1)


def sum_over_context(tensor: Tensor) -> Tensor:
    """The sum over the ranks that hold parts of the same sequences."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return tensor
    whole = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, group=group)
    return whole


def context_attention(
    query: Tensor, key: Tensor, value: Tensor, may_look: Tensor | None, group: dist.ProcessGroup
) -> Tensor:
    """Causal attention of this rank's queries to the keys of whole sequences, which the ranks bring together.

    Args:
        query, key, value: [S / cp, B, heads or groups, head_dim].
        may_look: [B, 1, S / cp, S], causal itself; None: causal and nothing else.

    Returns:
        [B, heads, S / cp, head_dim].
    """
    k, v = (x.permute(1, 2, 0, 3) for x in _in_order(torch.stack((key, value), 1), group).unbind(1))
    cp, rank, out = group.size(), group.rank(), []
    for half, chunk in enumerate((rank, 2 * cp - 1 - rank)):
        q = query.chunk(2)[half].permute(1, 2, 0, 3)
        size = q.shape[2]
        # What comes after a chunk is seen by none of its tokens.
        stop = (chunk + 1) * size
        if may_look is None:
            mask = torch.ones(size, stop, dtype=torch.bool, device=q.device).tril(stop - size)
        else:
            mask = may_look.chunk(2, 2)[half][..., :stop]
        out.append(attention(q, k[:, :, :stop], v[:, :, :stop], mask))
    return torch.cat(out, 2)


def _in_order(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S / cp, ...] of each rank -> [S, ...]; backward, each rank gets the sum of the gradients of its part."""
    chunks = gather_from_sequence_parallel_region(part, group=group).chunk(2 * group.size())
    return torch.cat([*chunks[::2], *chunks[::-2]])
