"""Context parallelism: split every sequence over a group of ranks, as Megatron does.

A sequence has 2 * cp chunks. Rank r holds chunks r and 2 * cp - 1 - r, in this order, so that all ranks have the same
amount of work under causal attention.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from nemo_minitron.backends.megatron.model.forward import Batch
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.runtime.torch_versions import attention


def own_part(batch: Batch, session: Session) -> Batch:
    """Return this rank's tokens of whole sequences. An attention mask keeps all its columns and this rank's rows."""
    if session.parallel.cp == 1:
        return batch
    return {key: _own_chunks(value, 2 if key == "attention_mask" else 1, session) for key, value in batch.items()}


def _own_chunks(whole: Tensor, dim: int, session: Session) -> Tensor:
    chunks = whole.unflatten(dim, (2 * session.parallel.cp, -1)).unbind(dim)
    return torch.cat([chunks[session.cp_rank], chunks[-1 - session.cp_rank]], dim)


def own_rows(tensor: Tensor, batch_size: int, session: Session) -> Tensor:
    """Return the rows of this rank's tokens from [B * S, ...] of whole sequences."""
    return own_part({"rows": tensor.unflatten(0, (batch_size, -1))}, session)["rows"].flatten(0, 1)


def sum_over_context(tensor: Tensor) -> Tensor:
    """Sum over the context-parallel ranks, which hold parts of the same sequences."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return tensor
    whole = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, group=group)
    return whole


def context_attention(
    query: Tensor, key: Tensor, value: Tensor, may_look: Tensor | None, group: dist.ProcessGroup
) -> Tensor:
    """Compute causal attention of this rank's queries over the keys of whole sequences, gathered from all ranks.

    Args:
        query, key, value: [S / cp, B, heads or groups, head_dim].
        may_look: [B, 1, S / cp, S], True where attention is allowed; includes the causal mask. None: plain causal mask.

    Returns:
        [B, heads, S / cp, head_dim].
    """
    k, v = (x.permute(1, 2, 0, 3) for x in _in_order(torch.stack((key, value), 1), group).unbind(1))
    cp, rank, out = group.size(), group.rank(), []
    for half, chunk in enumerate((rank, 2 * cp - 1 - rank)):
        q = query.chunk(2)[half].permute(1, 2, 0, 3)
        size = q.shape[2]
        # No token of a chunk attends to anything after the chunk.
        stop = (chunk + 1) * size
        if may_look is None:
            mask = torch.ones(size, stop, dtype=torch.bool, device=q.device).tril(stop - size)
        else:
            mask = may_look.chunk(2, 2)[half][..., :stop]
        out.append(attention(q, k[:, :, :stop], v[:, :, :stop], mask))
    return torch.cat(out, 2)


def _in_order(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather [S / cp, ...] of each rank into [S, ...]; backward, each rank gets the summed gradient of its part."""
    chunks = gather_from_sequence_parallel_region(part, group=group).chunk(2 * group.size())
    return torch.cat([*chunks[::2], *chunks[::-2]])
