"""Write a teacher's sparse distributions to disk, in any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.backends.megatron.data.datasets import (
    collate,
    eod_id_of,
    heldout_batches,
    heldout_rows,
    training_samples,
)
from nemo_minitron.backends.megatron.model.evaluate import sum_nll
from nemo_minitron.backends.megatron.model.forward import Batch, evaluating, forward_batches
from nemo_minitron.backends.megatron.model.head import head_weight, model_hidden, vocab_of_model
from nemo_minitron.backends.megatron.model.layers import require_document_mask, separation_of_documents
from nemo_minitron.backends.megatron.model.parts import Model
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.distillation.cache import (
    SHARDS,
    CacheFacts,
    Entry,
    gives_kl,
    pack,
    require_vocabulary,
    shard_name,
    write_shard,
)
from nemo_minitron.distillation.linear import Head
from nemo_minitron.distillation.sparse import SparseTeacher, sparsify, uniforms_of
from nemo_minitron.distillation.vocab import Vocab
from nemo_minitron.schema.losses import Sampled
from nemo_minitron.schema.training import TeacherCaching
from nemo_minitron.system.progress import Progress
from nemo_minitron.workload.heldout import heldout_batch_size


def write_cache(
    params: TeacherCaching,
    teacher_dir: Path,
    data_dir: Path,
    work_dir: Path,
    session: Session,
    progress: Progress,
    *,
    check_stop: Callable[[], None] = lambda: None,
) -> CacheFacts:
    """Write every shard that is missing in the work folder; data-parallel ranks write different ones.

    Args:
        check_stop: called between shards; it may raise an exception to stop the work.
    """
    require_document_mask(params.reset_attention_mask, session.parallel.cp)
    model, shape = load_model(teacher_dir, session, precision=params.precision, seq_len_tokens=params.seq_len_tokens)
    require_vocabulary(shape.vocab_size)
    windows = _heldout_windows(params, data_dir)
    facts = CacheFacts(
        sparse=params.sparse.model_dump(mode="json"),
        temperature=params.temperature,
        vocab_size=shape.vocab_size,
        seq_len_tokens=params.seq_len_tokens,
        num_samples=params.num_samples,
        seed=params.seed,
        reset_attention_mask=params.reset_attention_mask,
        num_heldout=len(windows),
    )
    samples = training_samples(
        data_dir,
        num_samples=params.num_samples,
        seq_len_tokens=params.seq_len_tokens,
        seed=params.seed,
        cache_dir=work_dir / "data_index",
    )
    mine = range(session.dp_rank, facts.num_shards, session.parallel.dp)
    # The first rank decides for all: another node may see a shard later.
    finished = set(session.gather([path.name for path in work_dir.glob(SHARDS)])[0])
    todo = [shard for shard in mine if shard_name(shard) not in finished]
    separate_at = eod_id_of(data_dir) if params.reset_attention_mask else None
    with evaluating(model), progress.bar("cache teacher", len(mine), "shards", done=len(mine) - len(todo)) as bar:
        for shard in todo:
            check_stop()
            numbers = facts.samples_of(shard)
            if numbers.start < facts.first_heldout:
                batches = _batches(samples, numbers, separate_at, session)
            else:
                # Validation does not mask attention between documents.
                batches = _batches(dict(enumerate(windows, facts.first_heldout)), numbers, None, session)
            entries = _entries(model, params, batches, shape.vocab_size, session)
            if session.is_last_stage and session.tp_rank == 0:
                write_shard(work_dir, shard, entries)
            bar.advance(samples=len(numbers))
    # Data-parallel ranks may have different numbers of shards to write, hours apart; a barrier would time out.
    session.gather(None)
    loss = _heldout_loss(model, params, shape.vocab_size, data_dir, session, progress)
    return replace(facts, valid_num_tokens=params.valid_num_tokens, valid_teacher_loss=loss)


def _heldout_windows(params: TeacherCaching, data_dir: Path) -> list[dict[str, Tensor]]:
    """Return the windows that distillation validates on; empty if the entries cannot give the KL."""
    if not gives_kl(params.sparse, params.temperature):
        return []
    tokens, length = params.valid_num_tokens, params.seq_len_tokens
    return heldout_rows(data_dir, num_tokens=tokens, seq_len_tokens=length, whole_documents=False)[0]


def _heldout_loss(
    model: Model, params: TeacherCaching, vocab_size: int, data_dir: Path, session: Session, progress: Progress
) -> float:
    """Return the teacher's loss in nats per token, on the windows that distillation validates on."""
    heldout = heldout_batches(
        data_dir,
        session,
        num_tokens=params.valid_num_tokens,
        seq_len_tokens=params.seq_len_tokens,
        batch_size=heldout_batch_size(params.seq_len_tokens),
        whole_documents=False,
    )
    return sum_nll(model, heldout, vocab_size, session, progress).loss


def _batches(samples: Any, numbers: range, separate_at: int | None, session: Session) -> Iterator[Batch]:
    """Yield micro-batches of these samples, one mask at a time in memory; the last one may be smaller."""
    size = session.parallel.micro_batch_size
    for start in range(0, len(numbers), size):
        of_batch = numbers[start : start + size]
        batch = {**collate([samples[i] for i in of_batch], session), "sample_ids": torch.tensor(of_batch)}
        if separate_at is not None:
            batch["attention_mask"] = separation_of_documents(batch["tokens"], separate_at)
        yield batch


def _entries(
    model: Model, params: TeacherCaching, batches: Iterable[Batch], vocab_size: int, session: Session
) -> list[Entry]:
    found: list[Entry] = []
    vocab = vocab_of_model(session, vocab_size)

    def keep(hidden_BSD: Tensor, batch: Batch) -> None:
        weight = head_weight(model, vocab_size)
        teacher = _distributions(hidden_BSD, weight, batch, params, vocab)
        length = params.seq_len_tokens
        for row, tokens in enumerate(batch["tokens"].cpu().numpy()):
            found.append(pack(teacher.rows(slice(row * length, (row + 1) * length)), tokens, params.sparse))

    forward_batches(model, batches, session, keep, forward=model_hidden)
    return found


def _distributions(
    hidden_BSD: Tensor, weight_VD: Tensor, batch: Batch, params: TeacherCaching, vocab: Vocab
) -> SparseTeacher:
    hidden = hidden_BSD.flatten(0, 1)
    head = Head(weight_VD, hidden, vocab)
    uniforms = None
    if isinstance(params.sparse, Sampled):
        uniforms = uniforms_of(params.seed, batch["sample_ids"], params.seq_len_tokens, params.sparse.rounds)
    parts = []
    for rows in head.all_blocks():
        points = None if uniforms is None else uniforms[rows].to(hidden.device)
        parts.append(sparsify(head.logits(rows), params.sparse, params.temperature, points, vocab))
    return SparseTeacher(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.probs for part in parts]),
        torch.cat([part.negative_entropy for part in parts]),
    )
