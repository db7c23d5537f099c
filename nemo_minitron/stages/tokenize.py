"""Text to Megatron indexed datasets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.config.schema import DataSource, TokenizeStage
from nemo_minitron.data.readers import read_documents, source_files
from nemo_minitron.errors import DataError
from nemo_minitron.hf.source import resolve_path
from nemo_minitron.progress import Bar
from nemo_minitron.stages.spec import Result, StageContext


def tokenize(params: TokenizeStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Tokenize every source with the teacher's tokenizer, and hold out a share of its documents.

    Writes train_NN and valid_NN indexed datasets and data.json.

    Raises:
        DataError: unreadable text, or a source without a train and a validation document.
    """
    from nemo_minitron.data.tokenization import DocumentTokenizer, tokenizer_fingerprint
    from nemo_minitron.hf.checkpoint import read_config

    if ctx.execution.workers:
        # Threads of the tokenizer library; it reads this when it starts.
        os.environ["RAYON_NUM_THREADS"] = str(ctx.execution.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    model_dir = inputs["tokenizer"].path
    tokenizer = DocumentTokenizer.load(model_dir, int(read_config(model_dir)["vocab_size"]))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    for number, source in enumerate(params.sources):
        for split, facts in _tokenize_source(params, source, number, tokenizer, ctx).items():
            splits[split].append(facts)
    totals = {
        f"{split}_{key}": sum(facts[key] for facts in splits[split])
        for split in splits
        for key in ("num_documents", "num_tokens", "num_bytes")
    }
    fingerprint = tokenizer_fingerprint(model_dir)
    data = {"vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id, "tokenizer_sha256": fingerprint, **splits}
    (ctx.out_dir / "data.json").write_text(json.dumps(data, indent=2) + "\n")
    return {**totals, "tokenizer_sha256": fingerprint, "sources": [source.source for source in params.sources]}


def _tokenize_source(
    params: TokenizeStage, source: DataSource, number: int, tokenizer: Any, ctx: StageContext
) -> dict[str, dict[str, Any]]:
    from nemo_minitron.backends.megatron.indexed import indexed_writers
    from nemo_minitron.data.tokenization import is_heldout

    files = source_files(resolve_path(source.source, Path(ctx.execution.assets_dir)))
    prefixes = [ctx.out_dir / f"{split}_{number:02d}" for split in ("train", "valid")]
    total_bytes = sum(file.stat().st_size for file in files)
    with (
        ctx.progress.bar(f"tokenize {source.source}", total_bytes, "bytes") as bar,
        indexed_writers(*prefixes, vocab_size=tokenizer.vocab_size) as (train, valid),
    ):
        texts = _texts(files, source, bar)
        for index, document in enumerate(tokenizer.documents(texts, where=source.source)):
            heldout = is_heldout(params.seed, number, index, params.valid_fraction)
            (valid if heldout else train).add(document)
        _require_both(train.num_documents, valid.num_documents, source, number)
    return {
        writer.prefix.name.split("_")[0]: {
            "prefix": writer.prefix.name,
            "source": source.source,
            "weight": source.weight,
            "num_documents": writer.num_documents,
            "num_tokens": writer.num_tokens,
            "num_bytes": writer.num_bytes,
        }
        for writer in (train, valid)
    }


def _texts(files: list[Path], source: DataSource, bar: Bar) -> Iterator[str]:
    """Documents of all files, at most `max_documents`; the bar moves file by file."""
    count = 0
    for file in files:
        for text in read_documents(file, source):
            if source.max_documents is not None and count >= source.max_documents:
                return
            count += 1
            if count % 1000 == 0:
                bar.advance(0, documents=count)
            yield text
        bar.advance(file.stat().st_size, documents=count)


def _require_both(num_train: int, num_valid: int, source: DataSource, number: int) -> None:
    if num_train and num_valid:
        return
    total = num_train + num_valid
    problem = "no documents" if total == 0 else f"{total} documents, too few to hold some out"
    raise DataError(
        f"Source {source.source} has {problem}.",
        where=f"stages.data.sources.{number}",
        allowed="at least one document for training and one for validation",
        next_step="Check the file, set document_separator for a .txt that holds many documents, "
        "or raise valid_fraction.",
    )
