"""Megatron's GPT and blended datasets over a dataset artifact, and batches by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_minitron.backends.megatron.data.index_cache import drop_unless_complete, mark_complete
from nemo_minitron.backends.megatron.model.forward import Batch
from nemo_minitron.backends.megatron.model.layers import separation_of_documents
from nemo_minitron.backends.megatron.runtime.context import own_part
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.data.windows import heldout_windows
from nemo_minitron.errors import DataError

DOCUMENTS_PER_VALIDATION = 8
"""Minimum number of documents in a validation during training, if the split has as many."""


@dataclass(frozen=True)
class _TokenizerFacts:
    """Replacement for a tokenizer, with the attributes that Megatron's datasets read for documents of token ids."""

    vocab_size: int
    eod: int
    # No id is padding: documents are packed without gaps.
    pad: int = -1
    unique_identifiers: tuple[tuple[str, str], ...] = (("class", "ids"),)


def training_samples(data_dir: Path, *, num_samples: int, seq_len_tokens: int, seed: int, cache_dir: Path) -> Any:
    """Return `num_samples` packed samples of the weighted blend, shuffled by seed; sample i is always the same.

    Raises:
        DataError: the sources hold less than one sample.
    """
    facts = json.loads((data_dir / "data.json").read_text())
    sources = facts["train"]
    if sum(source["num_tokens"] for source in sources) <= seq_len_tokens:
        raise DataError(
            f"The training split has fewer than {seq_len_tokens + 1} tokens: not one sample.",
            where=str(data_dir),
            next_step="Add text or lower seq_len_tokens.",
        )
    blend = ([str(data_dir / s["prefix"]) for s in sources], [float(s["weight"]) for s in sources])
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_len_tokens,
        blend_per_split=[blend, None, None],
        path_to_cache=str(cache_dir),
        tokenizer=_TokenizerFacts(facts["vocab_size"], facts["eod_id"]),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    drop_unless_complete(cache_dir)
    samples = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()[0]
    mark_complete(cache_dir)
    return samples


def samples_of_each(samples: Any, num_sources: int, num_samples: int) -> list[int]:
    """Count how many of the first `num_samples` training samples come from each source."""
    # Megatron builds a blended dataset only for two or more sources.
    if num_sources < 2:
        return [num_samples] * num_sources
    return np.bincount(samples.dataset_index[:num_samples], minlength=num_sources).tolist()


def step_batches(
    samples: Any,
    session: Session,
    *,
    step: int,
    global_batch_size: int,
    micro_batch_size: int,
    separate_at: int | None = None,
) -> list[Batch]:
    """Return this rank's part of the micro-batches of one optimizer step (0-based), all at once.

    Training reads the same ones one by one (`reader.py`). Sample numbers depend on the step only, so a resumed run uses
    the same data.

    Args:
        separate_at: end-of-document token that attention may not cross; None: packed samples are one text.
    """
    per_rank = global_batch_size // session.parallel.dp
    first = step * global_batch_size + session.dp_rank * per_rank
    return [
        training_batch(host_batch(samples, range(start, start + micro_batch_size)), session, separate_at)
        for start in range(first, first + per_rank, micro_batch_size)
    ]


def host_batch(samples: Any, numbers: range, *, pinned: bool = False) -> Batch:
    """Stack samples into [B, S] tensors on the CPU, in pinned memory if requested, with their numbers."""
    stacked = _stacked([samples[i] for i in numbers])
    if pinned:
        stacked = {key: tensor.pin_memory() for key, tensor in stacked.items()}
    return {**stacked, "sample_ids": torch.tensor(numbers)}


def training_batch(host: Batch, session: Session, separate_at: int | None) -> Batch:
    """Return this rank's part of a micro-batch of `host_batch`, on the session's device, with its attention mask."""
    batch = {key: host[key].to(session.device, non_blocking=True) for key in ("tokens", "labels", "loss_mask")}
    tokens, mask = batch["tokens"], batch["loss_mask"]
    if separate_at is not None:
        batch["attention_mask"] = separation_of_documents(tokens, separate_at)
    mine = own_part({**batch, "token_weights": mask / mask.sum()}, session)
    return {**mine, "sample_ids": host["sample_ids"], "sample_tokens": tokens}


def training_sources(data_dir: Path) -> list[dict[str, Any]]:
    """Return the sources of a dataset artifact, in the order of the blend."""
    return list(json.loads((data_dir / "data.json").read_text())["train"])


def eod_id_of(data_dir: Path) -> int:
    """Return the end-of-document token of a dataset artifact."""
    return int(json.loads((data_dir / "data.json").read_text())["eod_id"])


def collate(rows: list[dict[str, torch.Tensor]], session: Session) -> Batch:
    """Stack samples into [B, S] tensors on the session's device."""
    return {key: tensor.to(session.device) for key, tensor in _stacked(rows).items()}


def _stacked(rows: list[dict[str, torch.Tensor]]) -> Batch:
    return {key: torch.stack([row[key] for row in rows]) for key in ("tokens", "labels", "loss_mask")}


@dataclass(frozen=True)
class HeldOutBatches:
    """Windows over the first validation documents."""

    batches: list[Batch]
    num_bytes: int


def heldout_batches(
    data_dir: Path,
    session: Session,
    *,
    num_tokens: int,
    seq_len_tokens: int,
    batch_size: int,
    whole_documents: bool = True,
) -> HeldOutBatches:
    """Return at least `num_tokens` of held-out text (less if the split is smaller); every token is predicted once.

    Data-parallel ranks get every dp-th window, context-parallel ranks their part of each.

    Args:
        whole_documents: False truncates long documents, so that a few books do not dominate a validation; `num_bytes`
            is then meaningless.
    """
    all_rows, num_bytes = heldout_rows(
        data_dir, num_tokens=num_tokens, seq_len_tokens=seq_len_tokens, whole_documents=whole_documents
    )
    rows = all_rows[session.dp_rank :: session.parallel.dp]
    # Pipeline schedules need one batch shape: fill the last batch with rows whose loss mask is zero.
    while rows and len(rows) % batch_size:
        rows.append({**rows[-1], "loss_mask": torch.zeros_like(rows[-1]["loss_mask"])})
    of_batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return HeldOutBatches([_heldout_batch(some, session) for some in of_batches], num_bytes)


def _heldout_batch(rows: list[dict[str, torch.Tensor]], session: Session) -> Batch:
    whole = collate(rows, session)
    numbers = torch.stack([row["window_id"] for row in rows])
    return {**own_part(whole, session), "window_ids": numbers, "sample_tokens": whole["tokens"]}


def heldout_rows(
    data_dir: Path, *, num_tokens: int, seq_len_tokens: int, whole_documents: bool
) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Return (every window of `heldout_batches`, UTF-8 bytes of their documents)."""
    facts = json.loads((data_dir / "data.json").read_text())
    documents, sizes = _valid_documents(data_dir, facts)
    if not whole_documents:
        most = max(seq_len_tokens, num_tokens // DOCUMENTS_PER_VALIDATION)
        documents = (document[:most] for document in documents)
    windows = heldout_windows(
        documents, sizes, eod_id=facts["eod_id"], num_tokens=num_tokens, seq_len_tokens=seq_len_tokens
    )
    found = enumerate(zip(windows.tokens, windows.loss_mask, strict=True))
    return [_row(number, tokens, mask) for number, (tokens, mask) in found], windows.num_bytes


def _row(number: int, tokens: np.ndarray, mask: np.ndarray) -> dict[str, torch.Tensor]:
    ids, weights = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(mask.astype(np.float32))
    return {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": weights, "window_id": torch.tensor(number)}


def _valid_documents(data_dir: Path, facts: dict[str, Any]) -> tuple[Iterator[np.ndarray], Iterator[int]]:
    """Return documents and their UTF-8 sizes, alternating between sources so that a small budget covers all of them."""
    stores = [IndexedDataset(str(data_dir / s["prefix"])) for s in facts["valid"]]
    sizes = [np.load(data_dir / f"{s['prefix']}.bytes.npy", allow_pickle=False) for s in facts["valid"]]

    def order() -> Iterator[tuple[int, int]]:
        for index in range(max(map(len, stores))):
            yield from ((number, index) for number, store in enumerate(stores) if index < len(store))

    return (stores[s][i] for s, i in order()), (int(sizes[s][i]) for s, i in order())
