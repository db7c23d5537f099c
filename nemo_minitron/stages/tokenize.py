"""Text to Megatron indexed datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.config.schema import DataSource, TokenizeStage
from nemo_minitron.data.readers import Text, read_documents, source_files
from nemo_minitron.errors import DataError
from nemo_minitron.hf.source import resolve_path
from nemo_minitron.stages.spec import Result, StageContext

if TYPE_CHECKING:
    from nemo_minitron.data.tokenization import DocumentTokenizer

_TOTALS = ("num_documents", "num_tokens", "num_bytes")


def tokenize(params: TokenizeStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Tokenize every source with the teacher's tokenizer, and hold out a share of its documents.

    Writes train_NN and valid_NN indexed datasets and data.json.

    Raises:
        DataError: unreadable text, or a source without a train and a validation document.
    """
    from nemo_minitron.data.tokenization import DocumentTokenizer
    from nemo_minitron.hf.checkpoint import read_config, write_json
    from nemo_minitron.hf.tokenizer_identity import tokenizer_fingerprint

    model_dir = inputs["tokenizer"].path
    tokenizer = DocumentTokenizer.load(model_dir, int(read_config(model_dir)["vocab_size"]))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    for number, source in enumerate(params.sources):
        for split, facts in _tokenize_source(params, source, number, tokenizer, ctx).items():
            splits[split].append(facts)
    totals = {f"{split}_{key}": sum(facts[key] for facts in splits[split]) for split in splits for key in _TOTALS}
    # Without the eod that closes each document: it stands for no text.
    num_text_tokens = sum(totals[f"{split}_num_tokens"] - totals[f"{split}_num_documents"] for split in splits)
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "bytes_per_token": (totals["train_num_bytes"] + totals["valid_num_bytes"]) / num_text_tokens,
        "tokenizer_sha256": tokenizer_fingerprint(model_dir),
    }
    write_json(ctx.out_dir / "data.json", {**facts, **splits})
    return {**totals, **facts, "sources": [source.source for source in params.sources]}


def _tokenize_source(
    params: TokenizeStage, source: DataSource, number: int, tokenizer: DocumentTokenizer, ctx: StageContext
) -> dict[str, dict[str, Any]]:
    from nemo_minitron.backends.megatron.indexed import indexed_writers
    from nemo_minitron.data.tokenization import is_heldout, processes_for

    files = source_files(resolve_path(source.source, Path(ctx.execution.assets_dir)))
    total_bytes = sum(file.stat().st_size for file in files)
    num_processes = processes_for(total_bytes, ctx.execution.workers)
    prefixes = [ctx.out_dir / f"{split}_{number:02d}" for split in ("train", "valid")]
    with (
        ctx.progress.bar(f"tokenize {source.source}", total_bytes, "bytes") as bar,
        indexed_writers(*prefixes, vocab_size=tokenizer.vocab_size) as (train, valid),
    ):
        texts = _texts(files, source)
        documents = tokenizer.documents(texts, where=source.source, num_processes=num_processes)
        for index, document in enumerate(documents):
            heldout = is_heldout(params.seed, number, index, params.valid_fraction)
            (valid if heldout else train).add(document)
            bar.advance(document.position_bytes - bar.done, documents=index + 1)
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


def _texts(files: list[Path], source: DataSource) -> Iterator[Text]:
    """Documents of all files, at most `max_documents`; positions count from the first file on."""
    count, start_bytes = 0, 0
    for file in files:
        for text in read_documents(file, source):
            yield Text(text.text, start_bytes + text.position_bytes)
            count += 1
            if count == source.max_documents:
                return
        start_bytes += file.stat().st_size


def _require_both(num_train: int, num_valid: int, source: DataSource, number: int, stage: str) -> None:
    if num_train and num_valid:
        return
    total, split = num_train + num_valid, "training" if num_valid else "validation"
    raise DataError(
        f"Source {source.source} has {total} document{'s' * (total != 1)}, and none of them is for {split}.",
        where=f"stages.{stage}.sources.{number}",
        allowed="at least one document for training and one for validation",
        next_step="Set document_separator for a .txt that holds many documents, change valid_fraction, or add text.",
    )
