"""Tokenize text into Megatron's indexed datasets."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import DataError
from nemo_minitron.schema.data import DataSource
from nemo_minitron.stages.artifacts import Model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.tokenize.params import TokenizeStage

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.data.indexed import IndexedWriter
    from nemo_minitron.data.shard_plan import SourceShards
    from nemo_minitron.data.shards import Shard
    from nemo_minitron.data.tokenization import DocumentTokenizer

SHARDS = "shards"
_TOTALS = ("num_documents", "num_tokens", "num_bytes")


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    tokenizer: Model


def tokenize(params: TokenizeStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Tokenize every source with the teacher's tokenizer, and hold out a fraction of its documents for validation.

    Worker processes tokenize parts of the text into shards. Finished shards survive a kill, a stop or a full disk. At
    the end they are joined in order, so the result does not depend on the number of processes.

    Write the indexed datasets train_NN and valid_NN, and data.json.

    Raises:
        DataError: text cannot be read, or a source has no document for training or none for validation.
        Interrupted: a stop was requested.
    """
    from nemo_minitron.data.tokenization import DocumentTokenizer
    from nemo_minitron.hf.checkpoint import read_config, write_json
    from nemo_minitron.hf.tokenizer_identity import tokenizer_fingerprint

    model_dir = inputs.tokenizer.path
    tokenizer = DocumentTokenizer.load(model_dir, int(read_config(model_dir)["vocab_size"]))
    shards = _make_shards(params, tokenizer, str(model_dir), ctx)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    for number, made in enumerate(shards):
        for split, facts in _join(params, made, number, tokenizer, ctx).items():
            splits[split].append(facts)
    totals = {f"{split}_{key}": sum(facts[key] for facts in splits[split]) for split in splits for key in _TOTALS}
    # The end-of-document token of each document is not text.
    num_text_tokens = sum(totals[f"{split}_num_tokens"] - totals[f"{split}_num_documents"] for split in splits)
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "bytes_per_token": (totals["train_num_bytes"] + totals["valid_num_bytes"]) / num_text_tokens,
        "tokenizer_sha256": tokenizer_fingerprint(model_dir),
    }
    write_json(ctx.out_dir / "data.json", {**facts, **splits})
    return {**totals, **facts, "sources": [source.source for source in params.sources]}


# --- shards ---------------------------------------------------------------------------------------


def _make_shards(
    params: TokenizeStage, tokenizer: DocumentTokenizer, model_dir: str, ctx: StageContext
) -> list[SourceShards]:
    from nemo_minitron.backends.megatron.data.indexed import token_dtype
    from nemo_minitron.data.shard_plan import ShardPlan, plan_source
    from nemo_minitron.data.shard_pool import WorkerSettings, processes_for, shard_workers
    from nemo_minitron.data.shards import ShardFolder, sha256_of
    from nemo_minitron.data.sources import require_read_once

    dtype = token_dtype(tokenizer.vocab_size).name
    identity = sha256_of(tokenizer.definition, tokenizer.vocab_size, tokenizer.eod_id, dtype)
    folder = ShardFolder(ctx.work_dir / SHARDS, identity)
    keys = [f"stages.{ctx.name}.sources.{number}" for number in range(len(params.sources))]
    files = [_files(source, key, ctx) for source, key in zip(params.sources, keys, strict=True)]
    require_read_once(params.sources, files, keys)
    sources = [plan_source(number, source, files[number]) for number, source in enumerate(params.sources)]
    plan = ShardPlan(sources, folder)
    found = plan.reuse_finished()
    ctx.progress.say(f"{found} of {plan.num_tasks} shards exist" if found else f"{plan.num_tasks} shards to make")
    num_processes = min(processes_for(plan.bytes_left, ctx.execution.workers), max(1, plan.num_tasks - found))
    with (
        ctx.progress.bar("tokenize", plan.num_bytes, "bytes", done=plan.num_bytes - plan.bytes_left) as bar,
        shard_workers(WorkerSettings(folder, tokenizer, dtype, model_dir), num_processes, ctx.check_stop) as workers,
    ):
        first = bar.done
        for _ in plan.run(workers):
            ctx.check_stop()
            num_bytes, documents = workers.done()
            per_s = documents / max(bar.elapsed_s, 1e-3)
            bar.advance(first + num_bytes - bar.done, documents=documents, per_s=f"{per_s:,.0f}")
    return sources


def _files(source: DataSource, key: str, ctx: StageContext) -> list[Path]:
    from nemo_minitron.data.readers import require_separator_is_used
    from nemo_minitron.stages.common.source_files import files_of

    files = files_of(source.source, ctx)
    require_separator_is_used(files, source, key)
    return files


# --- joining --------------------------------------------------------------------------------------


def _join(
    params: TokenizeStage, made: SourceShards, number: int, tokenizer: DocumentTokenizer, ctx: StageContext
) -> dict[str, dict[str, Any]]:
    """Join the shards of a source, in order, into its training and validation datasets."""
    from nemo_minitron.backends.megatron.data.indexed import indexed_writers

    source = made.source
    prefixes = [ctx.out_dir / f"{split}_{number:02d}" for split in ("train", "valid")]
    with (
        ctx.progress.bar(f"join {source.source}", made.num_documents, "documents") as bar,
        indexed_writers(*prefixes, vocab_size=tokenizer.vocab_size) as (train, valid),
    ):
        for shard, count in made.in_order():
            ctx.check_stop()
            heldout = _heldout(params, number, bar.done, count)
            _add(shard, heldout, train, valid)
            bar.advance(count)
        _require_both(train.num_documents, valid.num_documents, source, number, ctx.name)
    return {
        writer.prefix.name.split("_")[0]: {
            "prefix": writer.prefix.name,
            "source": source.source,
            "weight": source.weight,
            **{key: getattr(writer, key) for key in _TOTALS},
        }
        for writer in (train, valid)
    }


def _heldout(params: TokenizeStage, source: int, start: int, count: int) -> list[bool]:
    from nemo_minitron.data.tokenization import is_heldout

    numbers = range(start, start + count)
    return [is_heldout(params.seed, source, number, params.valid_fraction) for number in numbers]


def _add(shard: Shard, heldout: Sequence[bool], train: IndexedWriter, valid: IndexedWriter) -> None:
    """Write the first `len(heldout)` documents of a shard, in runs of documents for the same dataset."""
    import numpy as np

    if not heldout:
        return
    documents = shard.documents()
    lengths, num_bytes = documents[:, : len(heldout)]
    with shard.ids_file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as ids:
        width = len(ids) // int(documents[0].sum())
        ends = np.concatenate([[0], np.cumsum(lengths)]) * width
        for start, end in _runs(heldout):
            writer = valid if heldout[start] else train
            run = ids[int(ends[start]) : int(ends[end])]
            writer.add_run(memoryview(run), lengths[start:end], num_bytes[start:end])


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each run of equal flags."""
    start = 0
    for number in range(1, len(flags) + 1):
        if number == len(flags) or flags[number] != flags[start]:
            yield start, number
            start = number


def _require_both(num_train: int, num_valid: int, source: DataSource, number: int, stage: str) -> None:
    if num_train and num_valid:
        return
    total, split = num_train + num_valid, "training" if num_valid else "validation"
    raise DataError(
        f"Source {source.source} has {total} document{'s' * (total != 1)}, and none of them is left for {split}.",
        where=f"stages.{stage}.sources.{number}",
        allowed="at least one document for training and one for validation",
        next_step="Set document_separator if a .txt contains many documents, change valid_fraction, or add text.",
    )
