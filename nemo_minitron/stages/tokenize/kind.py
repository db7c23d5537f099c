"""The kind of stage that tokenizes text into Megatron's indexed datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.data.blocks import text_bytes
from nemo_minitron.stages.kind import Output, Result, Source, StageKind
from nemo_minitron.stages.tokenize.params import TokenizeStage

TOKENIZED_BYTES = 2
"""Bytes of shards and datasets together per byte of text, for four characters and at most four bytes per token."""


def _sources(params: TokenizeStage) -> Iterator[Source]:
    for number, text in enumerate(params.sources):
        yield Source(f"sources.{number}.source", text.source, "text")


def _source_disk_bytes(file: Path, num_bytes: int) -> int:
    """Return the disk space of a file's shards and joined datasets together."""
    return TOKENIZED_BYTES * text_bytes(file, num_bytes)


def _result_tokens(result: Result) -> int:
    return int(result["train_num_tokens"]) + int(result["valid_num_tokens"])


TOKENIZE = StageKind(
    name="tokenize",
    params=TokenizeStage,
    run="nemo_minitron.stages.tokenize.run:tokenize",
    outputs=(Output.TOKENIZED_TEXT,),
    inputs={"tokenizer": (Output.TOKENIZER,)},
    report="data",
    sources=_sources,
    source_disk_bytes=_source_disk_bytes,
    result_tokens=_result_tokens,
)
