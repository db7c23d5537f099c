"""Text to ids to indexed datasets: what is appended, what is held out, and that processes change nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_minitron.artifacts.types import Artifact, Inputs
from nemo_minitron.config.schema import DataSource, Execution, TokenizeStage
from nemo_minitron.data import tokenization
from nemo_minitron.data.readers import Text, read_documents
from nemo_minitron.data.tokenization import DocumentTokenizer, is_heldout, processes_for
from nemo_minitron.errors import CheckpointError, DataError, EnvironmentProblem
from nemo_minitron.hf.source import BUILT_IN
from nemo_minitron.hf.tokenizer_identity import tokenizer_fingerprint
from nemo_minitron.progress import Progress
from nemo_minitron.stages.spec import StageContext
from nemo_minitron.stages.tokenize import tokenize

TOY_MODEL, TOY_TEXT = BUILT_IN["toy-llama"], BUILT_IN["toy-text"]


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer.load(TOY_MODEL, 512)


def toy_texts() -> Iterator[Text]:
    return read_documents(TOY_TEXT, DataSource(source="asset:toy-text"))


def context(folder: Path, **execution: Any) -> StageContext:
    folder.mkdir(parents=True)
    return StageContext("data", "test", folder, folder, Execution(**execution), Progress(silent=True))


def run_stage(folder: Path, sources: list[dict[str, Any]], *, model: Path = TOY_MODEL, **params: Any) -> dict[str, Any]:
    stage = TokenizeStage(kind="tokenize", sources=sources, **params)
    inputs = Inputs({"tokenizer": Artifact("teacher", "import", model, "", {})})
    return dict(tokenize(stage, inputs, context(folder)))


def die(_: list[str]) -> None:
    os._exit(9)


def edited_tokenizer(folder: Path, **changes: Any) -> Path:
    """A copy of the toy tokenizer with other keys in tokenizer_config.json."""
    shutil.copytree(TOY_MODEL, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


# --- ids ------------------------------------------------------------------------------------------


def test_ids_are_those_of_transformers_with_eod_and_nothing_else_added(tokenizer: DocumentTokenizer) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(TOY_MODEL))
    texts = ["The moor at night.", "caf\u00e9 \U0001f642", "x " * 5000]
    found = list(tokenizer.documents([Text(text, 1) for text in texts], where="x"))
    assert [document.ids.tolist() for document in found] == [
        [*reference(text, add_special_tokens=False).input_ids, 0] for text in texts
    ]
    assert [document.num_bytes for document in found] == [len(text.encode()) for text in texts]


def test_the_number_of_processes_changes_nothing(tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "BATCH_CHARS", 5000)
    alone = list(tokenizer.documents(toy_texts(), where="x"))
    shared = list(tokenizer.documents(toy_texts(), where="x", num_processes=2))
    assert len(alone) == 740
    for one, other in zip(alone, shared, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert (one.num_bytes, one.position_bytes) == (other.num_bytes, other.position_bytes)


def test_an_error_while_reading_stops_the_processes_and_is_shown(tokenizer: DocumentTokenizer) -> None:
    def texts() -> Iterator[Text]:
        yield Text("fine", 1)
        raise DataError("bad row")

    with pytest.raises(DataError, match="bad row"):
        list(tokenizer.documents(texts(), where="x", num_processes=2))


def test_a_killed_process_is_a_clear_error(tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_encode_here", die)
    texts = [Text("fine", 1)] * 3
    monkeypatch.setattr(tokenization, "BATCH_CHARS", 1)
    with pytest.raises(EnvironmentProblem, match=r"killed(.|\n)*execution\.workers"):
        list(tokenizer.documents(texts, where="x", num_processes=2))


@pytest.mark.parametrize(
    ("size_bytes", "workers", "processes"), [(0, None, 1), (1 << 20, 8, 1), (1 << 30, 8, 8), (9 << 20, 8, 2)]
)
def test_small_texts_are_not_worth_a_process(size_bytes: int, workers: int | None, processes: int) -> None:
    assert processes_for(size_bytes, workers) == processes


# --- which tokenizer ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "eos", "eod"),
    [
        (["<|endoftext|>", "<|im_end|>"], "<|im_end|>", "<|endoftext|>"),
        (["<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>", "<|end_of_text|>"),
        (["<s>", "</s>"], "</s>", "</s>"),
    ],
)
def test_eod_is_what_the_base_model_saw_between_documents(
    tmp_path: Path, tokens: list[str], eos: str, eod: str
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {token: number for number, token in enumerate(["a", *tokens])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos).save_pretrained(tmp_path)
    assert DocumentTokenizer.load(tmp_path, 4).eod_id == vocab[eod]


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tokenizer: DocumentTokenizer) -> None:
    small = DocumentTokenizer(tokenizer.definition, 300, 0)
    with pytest.raises(DataError, match=r"Tokenizer mismatch: token id \d+ is beyond the model's vocabulary of 300"):
        list(small.documents(toy_texts(), where="x"))


def test_an_eod_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 9}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="token id 9 is beyond the model's vocabulary of 9"):
        DocumentTokenizer.load(tmp_path, 9)


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": {"type": "BPE"}}', "[1]"])
def test_a_missing_or_damaged_tokenizer_is_a_clear_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError):
        DocumentTokenizer.load(tmp_path, 512)
    with pytest.raises(CheckpointError):
        tokenizer_fingerprint(tmp_path)


def test_code_beside_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    model = edited_tokenizer(tmp_path / "model", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    with contextlib.suppress(CheckpointError):
        DocumentTokenizer.load(model, 512)
    assert not (tmp_path / "ran").exists()


def test_the_fingerprint_follows_the_vocabulary_only(tmp_path: Path) -> None:
    chat = edited_tokenizer(tmp_path / "chat", chat_template="{{ messages }}", eos_token="the")
    assert tokenizer_fingerprint(chat) == tokenizer_fingerprint(TOY_MODEL)
    file = chat / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content))
    assert tokenizer_fingerprint(chat) != tokenizer_fingerprint(TOY_MODEL)


# --- the split ------------------------------------------------------------------------------------


def test_the_split_has_the_share_asked_for_and_depends_on_the_seed() -> None:
    held = {seed: [i for i in range(20_000) if is_heldout(seed, 0, i, 0.05)] for seed in (1, 2)}
    assert 900 < len(held[1]) < 1100
    assert held[1] != held[2]
    assert held[1][:4] == [1, 17, 23, 54], "pinned: with another split old and new runs cannot be compared"


def test_a_larger_share_only_adds_documents() -> None:
    small, large = ({i for i in range(2000) if is_heldout(1, 0, i, share)} for share in (0.02, 0.2))
    assert small < large


# --- the stage ------------------------------------------------------------------------------------


def test_the_dataset_artifact_holds_every_document_once(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    rows = [f"Document number {number}." for number in range(200)]
    text = tmp_path / "x.txt"
    text.write_text("\f".join(rows))
    sources = [
        {"source": "asset:toy-text", "weight": 3.0, "max_documents": 300},
        {"source": str(text), "document_separator": "\f"},
    ]
    out = tmp_path / "out"
    result = run_stage(out, sources, valid_fraction=0.1)

    facts = json.loads((out / "data.json").read_text())
    assert (facts["vocab_size"], facts["eod_id"]) == (512, 0)
    assert facts["tokenizer_sha256"] == result["tokenizer_sha256"] == tokenizer_fingerprint(TOY_MODEL)
    assert [entry["weight"] for entry in facts["train"]] == [3.0, 1.0]
    reference = list(DocumentTokenizer.load(TOY_MODEL, 512).documents([Text(row, 0) for row in rows], where="x"))
    expected: dict[str, list[Any]] = {"train_01": [], "valid_01": []}
    for number, document in enumerate(reference):
        expected["valid_01" if is_heldout(1234, 1, number, 0.1) else "train_01"].append(document)
    for name, documents in expected.items():
        store = IndexedDataset(str(out / name))
        assert len(store) == len(documents) == len(store.document_indices) - 1
        assert all(np.array_equal(store[i], document.ids) for i, document in enumerate(documents))
        entry = next(entry for split in ("train", "valid") for entry in facts[split] if entry["prefix"] == name)
        assert entry["num_tokens"] == sum(len(document.ids) for document in documents)
        assert entry["num_bytes"] == sum(document.num_bytes for document in documents)
        sizes = np.load(out / f"{name}.bytes.npy", allow_pickle=False)
        assert sizes.tolist() == [document.num_bytes for document in documents]
    first = [facts[split][0]["num_documents"] for split in ("train", "valid")]
    assert sum(first) == 300
    assert result["train_num_documents"] + result["valid_num_documents"] == 500
    texts = result["train_num_bytes"] + result["valid_num_bytes"]
    tokens = result["train_num_tokens"] + result["valid_num_tokens"] - 500
    assert facts["bytes_per_token"] == texts / tokens


def test_the_same_stage_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_stage(tmp_path / name, [{"source": "asset:toy-text", "max_documents": 100}], valid_fraction=0.1)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["data.json"] + [
        f"{split}_00.{ending}" for split in ("train", "valid") for ending in ("bin", "bytes.npy", "idx")
    ]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_large_vocabulary_is_stored_in_wide_integers(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from nemo_minitron.backends.megatron.indexed import indexed_writers
    from nemo_minitron.data.tokenization import Document

    for vocab_size, dtype in ((49_152, np.uint16), (128_256, np.int32)):
        prefix = tmp_path / str(vocab_size)
        with indexed_writers(prefix, vocab_size=vocab_size) as (writer,):
            writer.add(Document(np.array([vocab_size - 1, 0]), 5))
        store = IndexedDataset(str(prefix))
        assert store[0].tolist() == [vocab_size - 1, 0]
        assert store[0].dtype == dtype
