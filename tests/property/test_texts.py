"""Random folders, files and texts give the documents of a simple reader, the ids of the library and the same bytes."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.data import blocks, pieces, shard_pool
from nemo_minitron.data.encoder import Encoder, open_tokenizer
from nemo_minitron.data.readers import read_documents
from nemo_minitron.data.shard_pool import WorkerSettings
from nemo_minitron.data.shards import Shard, Task
from nemo_minitron.data.tokenization import is_heldout
from nemo_minitron.data.word_cuts import KNOWN_EXPRESSIONS, can_be_cut
from nemo_minitron.errors import DataError, Interrupted
from nemo_minitron.hf.source import BUILT_IN
from nemo_minitron.schema.data import DataSource
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.artifacts import Model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.tokenize.params import TokenizeStage
from nemo_minitron.stages.tokenize.run import Inputs, tokenize
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress
from tests.support.examples import budget

TOY_MODEL = BUILT_IN["toy-llama"]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data[:7], 1) + gzip.compress(data[7:], 1),
    ".zst": lambda data: b"".join(zstandard.compress(part) for part in (data[:7], data[7:])),
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
}
CHARACTERS = (
    " \n\t\r\f\v\0.,'\u2019\"-_/\\<>|(){}0123456789\u0663\u00bdaAbBsStTr"
    "\u00e9e\u0301\u0308\u00a0\u2003\u4e16\u0416\ud55c\U0001f642"
)
DOCUMENTS = st.lists(st.text(CHARACTERS, max_size=60), min_size=1, max_size=12)


def packed(kind: str, texts: list[str], separator: str) -> bytes:
    if kind == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), sink)
        return sink.getvalue().to_pybytes()
    rows = [{"id": 1, "text": text} for text in texts]
    if kind == ".json":
        return json.dumps(rows).encode()
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return separator.join(texts).encode()


def plain(text: str, separator: str) -> str:
    """Generate a text that a .txt represents exactly."""
    return text.replace("\0", "").replace("\r", "").replace(separator, "")


@st.composite
def folders(draw: st.DrawFn) -> tuple[dict[str, bytes], list[str], str]:
    """Generate (files by name, documents in order, separator of the recipe)."""
    separator = draw(st.sampled_from(["\n---\n", "\r\n===\r\n", "#"]))
    as_read = separator.replace("\r\n", "\n")
    files, documents = {}, []
    for number in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from([".txt", ".jsonl", ".json", ".parquet"]))
        texts = draw(DOCUMENTS)
        # The first file is a .txt, because a separator is refused without one.
        if kind == ".txt" or number == 0:
            kind, texts = ".txt", [plain(text, as_read) for text in texts]
        texts.append("The end.")
        compression = draw(st.sampled_from(list(PACK)))
        folder = draw(st.sampled_from(["", "deep/", "[x] y/"]))
        name = f"{folder}{number} \u4e16{kind}{compression}"
        files[name] = PACK[compression](packed(kind, texts, separator))
        documents.append((Path(name), [text for text in texts if text.strip()]))
    in_order = [text for _, texts in sorted(documents) for text in texts]
    return files, in_order, separator


class Threads:
    """Workers that finish in any order, as processes do, without their start-up time."""

    size = 3

    def __init__(self, work: WorkerSettings) -> None:
        self.work, self.executor = work, ThreadPoolExecutor(self.size)

    def submit(self, task: Task) -> Future[Shard]:
        return self.executor.submit(self.work.folder.make, task, self.work.encoder(), lambda *_: None)

    def done(self) -> tuple[int, int]:
        return 0, 0


@contextmanager
def threads(work: WorkerSettings, *_: object) -> Iterator[Threads]:
    workers = Threads(work)
    try:
        yield workers
    finally:
        workers.executor.shutdown()


class StopAfter(StopRequest):
    def __init__(self, questions: int) -> None:
        super().__init__()
        self.left = questions

    def source(self) -> str | None:
        self.left -= 1
        return "SIGTERM" if self.left < 0 else None


def run(text: Path, work: Path, separator: str, stop: StopRequest, most: int | None) -> dict[str, bytes]:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    source = {"source": str(text), "document_separator": separator, "max_documents": most}
    stage = TokenizeStage(kind="tokenize", sources=[source], valid_fraction=0.3)
    context = StageContext("data", "test", out, work, Execution(workers=1), Progress(silent=True), stop=stop)
    tokenize(stage, Inputs(Model("teacher", "import", TOY_MODEL, "", {})), context)
    return {file.name: file.read_bytes() for file in out.iterdir()}


@budget(20)
@given(folders(), st.integers(0, 30), st.sampled_from([None, 2, 5]))
def test_a_folder_gives_the_same_documents_for_any_workers_and_stops(
    folder: tuple[dict[str, bytes], list[str], str], questions: int, most: int | None
) -> None:
    files, documents, separator = folder
    documents = documents[:most]
    library = open_tokenizer((TOY_MODEL / "tokenizer.json").read_text())
    expected: dict[str, list[int]] = {"train": [], "valid": []}
    for number, text in enumerate(documents):
        split = "valid" if is_heldout(1234, 0, number, 0.3) else "train"
        expected[split] += [*library.encode(text, add_special_tokens=False).ids, 0]
    with (
        tempfile.TemporaryDirectory() as scratch,
        patch.object(blocks, "BLOCK_BYTES", 50),
        patch.object(pieces, "SMALLEST_BYTES", 60),
    ):
        root = Path(scratch)
        for name, content in files.items():
            (root / "text" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "text" / name).write_bytes(content)
        if not all(expected.values()):
            with pytest.raises(DataError, match="none of them is left for"):
                run(root / "text", root / "whole", separator, StopRequest(), most)
            return
        whole = run(root / "text", root / "whole", separator, StopRequest(), most)
        for split, ids in expected.items():
            assert np.frombuffer(whole[f"{split}_00.bin"], np.uint16).tolist() == ids
        with suppress(Interrupted):
            run(root / "text", root / "stopped", separator, StopAfter(questions), most)
        assert run(root / "text", root / "stopped", separator, StopRequest(), most) == whole
        with patch.object(shard_pool, "shard_workers", threads):
            assert run(root / "text", root / "shared", separator, StopRequest(), most) == whole


# --- ids ------------------------------------------------------------------------------------------


@cache
def definition(number: int) -> str:
    """Train a tokenizer with one of the expressions for which texts may be cut; the last two are GPT-2's."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    expressions = sorted(KNOWN_EXPRESSIONS)
    tokenizer = Tokenizer(models.BPE())
    if number < len(expressions):
        split = pre_tokenizers.Split(Regex(expressions[number]), "isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, last])
        tokenizer.normalizer = normalizers.NFC()
    else:
        steps = [pre_tokenizers.Digits(True)] if number == len(expressions) else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rows = read_documents(BUILT_IN["toy-text"], DataSource(source="x"))
    texts = [text.text for text, _ in zip(rows, range(40), strict=False)]
    tokenizer.train_from_iterator([*texts, *["a   b    c  \n\n  d .\n -- 12 345\n\n\n"] * 400], trainer)
    tokenizer.add_tokens([AddedToken("<x>", normalized=False)])
    return str(tokenizer.to_str())


PIECES = st.one_of(
    st.text(CHARACTERS, max_size=8),
    st.sampled_from(
        ["hound", "moor's", "<|endoftext|>", "<x>", " ", "  ", "\n", "\n\n", "a   b  ", " \n", "I'll", "3.14", "..."]
    ),
)


@budget(60)
@given(
    st.integers(0, len(KNOWN_EXPRESSIONS) + 1),
    st.lists(st.lists(PIECES, max_size=14).map(" ".join) | st.lists(PIECES, max_size=14).map("".join), max_size=5),
)
def test_ids_of_words_are_those_of_the_whole_text(number: int, texts: list[str]) -> None:
    facts = definition(number)
    assert can_be_cut(facts)
    library = open_tokenizer(facts)
    encoder = Encoder(facts, vocab_size=1000, eod_id=0, dtype="uint16", where="x")
    for _ in range(2):
        found = [np.frombuffer(row, np.uint16).tolist() for row in encoder.encode(texts)]
        assert found == [[*library.encode(text, add_special_tokens=False).ids, 0] for text in texts]


# --- any bytes ------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """Generate (suffix, content): random bytes, or a valid file with some bytes changed or missing."""
    kind = draw(st.sampled_from([".txt", ".jsonl", ".json", ".parquet"]))
    compression = draw(st.sampled_from(list(PACK)))
    if draw(st.booleans()):
        inner = draw(st.binary(max_size=60) | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(_json))
        content = inner if draw(st.booleans()) else PACK[compression](inner)
        return kind + compression, content
    content = bytearray(PACK[compression](packed(kind, draw(DOCUMENTS), "#")))
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return kind + compression, bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def _json(value: Any) -> bytes:
    return json.dumps({"text": value} if not isinstance(value, list) else value).encode()


@budget(30)
@given(damaged(), st.sampled_from([None, "#"]))
def test_any_bytes_are_documents_or_an_error_that_names_the_file(
    content: tuple[str, bytes], separator: str | None
) -> None:
    suffix, data = content
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"some text{suffix}"
        file.write_bytes(data)
        try:
            found = list(read_documents(file, DataSource(source="x", document_separator=separator)))
        except DataError as error:
            output = str(error)
            assert str(file) in output
            return
        assert found
        assert all(text.text.strip() for text in found)
        for text in found:
            text.text.encode("utf-8")


@pytest.mark.parametrize("expression", sorted(KNOWN_EXPRESSIONS))
def test_no_known_expression_matches_across_a_cut(expression: str) -> None:
    """An expression that matches a space after another character would need changes in word_cuts."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(expression), "isolated")
    for before in "aZ5_.,'\u4e16\u0416/<)":
        for after in "aZ5_.,'\u4e16\u0416/<(":
            text = f"x{before} {after}y"
            starts = {start for _, (start, _) in split.pre_tokenize_str(text)}
            assert 2 in starts, text
