"""Tests of tokenization: ids, eod, the held-out split and the indexed dataset."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_minitron.data import shard_pool
from nemo_minitron.data.encoder import Encoder
from nemo_minitron.data.shard_pool import processes_for
from nemo_minitron.data.tokenization import DocumentTokenizer, is_heldout
from nemo_minitron.data.word_cuts import can_be_cut
from nemo_minitron.errors import CheckpointError, DataError
from nemo_minitron.hf.tokenizer_identity import tokenizer_fingerprint
from tests.support.tiny_data import add_document
from tests.support.tokenize_stage import TOY_MODEL, contents, run_stage, toy_texts


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer.load(TOY_MODEL, 512)


def ids(tokenizer: DocumentTokenizer, texts: list[str]) -> list[list[int]]:
    return [np.frombuffer(row, np.uint16).tolist() for row in tokenizer.encoder("uint16", "x").encode(texts)]


def edited_tokenizer(folder: Path, **changes: Any) -> Path:
    """Copy the toy tokenizer with other keys in tokenizer_config.json."""
    shutil.copytree(TOY_MODEL, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


# --- ids ------------------------------------------------------------------------------------------


def test_ids_are_those_of_transformers_with_eod_and_nothing_else_added(tokenizer: DocumentTokenizer) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(TOY_MODEL))
    texts = ["The moor at night.", "caf\u00e9 \U0001f642", "x " * 5000]
    expected = [[*reference(text, add_special_tokens=False).input_ids, 0] for text in texts]
    assert ids(tokenizer, texts) == expected


def test_no_more_processes_than_usable_cores_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pool, "usable_cores", lambda: 3)
    assert processes_for(1 << 40, None) == 3


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
def test_eod_is_the_token_that_the_base_model_was_trained_with(
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
        ids(small, toy_texts())


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


def test_the_split_has_the_requested_share_and_depends_on_the_seed() -> None:
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
    result = run_stage(tmp_path, sources, valid_fraction=0.1)
    out = tmp_path / "out"

    facts = json.loads((out / "data.json").read_text())
    assert (facts["vocab_size"], facts["eod_id"]) == (512, 0)
    assert facts["tokenizer_sha256"] == result["tokenizer_sha256"] == tokenizer_fingerprint(TOY_MODEL)
    assert [entry["weight"] for entry in facts["train"]] == [3.0, 1.0]
    reference = ids(DocumentTokenizer.load(TOY_MODEL, 512), rows)
    expected: dict[str, list[Any]] = {"train_01": [], "valid_01": []}
    for number, document in enumerate(zip(reference, rows, strict=True)):
        expected["valid_01" if is_heldout(1234, 1, number, 0.1) else "train_01"].append(document)
    for name, documents in expected.items():
        store = IndexedDataset(str(out / name))
        assert len(store) == len(documents) == len(store.document_indices) - 1
        assert all(store[i].tolist() == row for i, (row, _) in enumerate(documents))
        entry = next(entry for split in ("train", "valid") for entry in facts[split] if entry["prefix"] == name)
        assert entry["num_tokens"] == sum(len(row) for row, _ in documents)
        assert entry["num_bytes"] == sum(len(text) for _, text in documents)
        sizes = np.load(out / f"{name}.bytes.npy", allow_pickle=False)
        assert sizes.tolist() == [len(text) for _, text in documents]
    first = [facts[split][0]["num_documents"] for split in ("train", "valid")]
    assert sum(first) == 300
    assert result["train_num_documents"] + result["valid_num_documents"] == 500
    texts = result["train_num_bytes"] + result["valid_num_bytes"]
    tokens = result["train_num_tokens"] + result["valid_num_tokens"] - 500
    assert facts["bytes_per_token"] == texts / tokens


def test_sources_that_overlap_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.jsonl").write_text("".join(json.dumps({"text": f"Text {number}."}) + "\n" for number in range(100)))
    sources = [{"source": str(text)}, {"source": f"{text}/*.jsonl"}]
    with pytest.raises(DataError, match=r"both read a\.jsonl(.|\n)*stages\.data\.sources\.0, stages\.data\.sources\.1"):
        run_stage(tmp_path, sources, valid_fraction=0.1)


def test_the_same_stage_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_stage(tmp_path / name, [{"source": "asset:toy-text", "max_documents": 100}], valid_fraction=0.1)
    assert sorted(contents(tmp_path / "one")) == ["data.json"] + [
        f"{split}_00.{ending}" for split in ("train", "valid") for ending in ("bin", "bytes.npy", "idx")
    ]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_large_vocabulary_is_stored_in_wide_integers(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from nemo_minitron.backends.megatron.data.indexed import indexed_writers

    for vocab_size, dtype in ((49_152, np.uint16), (128_256, np.int32)):
        prefix = tmp_path / str(vocab_size)
        with indexed_writers(prefix, vocab_size=vocab_size) as (writer,):
            add_document(writer, np.array([vocab_size - 1, 0]), 5)
        store = IndexedDataset(str(prefix))
        assert store[0].tolist() == [vocab_size - 1, 0]
        assert store[0].dtype == dtype


def test_the_index_is_the_one_that_megatron_would_write(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from nemo_minitron.backends.megatron.data.indexed import indexed_writers

    documents = [np.arange(length) for length in (3, 1, 40, 7)]
    for vocab_size in (512, 128_256):
        ours, theirs = tmp_path / f"ours{vocab_size}", tmp_path / f"theirs{vocab_size}"
        builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=DType.optimal_dtype(vocab_size))
        with indexed_writers(ours, vocab_size=vocab_size) as (writer,):
            for document in documents:
                add_document(writer, document, 1)
                builder.add_document(torch.from_numpy(document), [len(document)])
        builder.finalize(f"{theirs}.idx")
        for ending in ("bin", "idx"):
            assert Path(f"{ours}.{ending}").read_bytes() == Path(f"{theirs}.{ending}").read_bytes()


# --- words ----------------------------------------------------------------------------------------


def test_text_is_cut_only_for_tokenizers_that_are_known_to_be_safe() -> None:
    definition = json.loads((TOY_MODEL / "tokenizer.json").read_text())

    def changed(**keys: Any) -> bool:
        return can_be_cut(json.dumps({**definition, **keys}))

    assert changed()
    assert changed(normalizer={"type": "NFC"})
    assert not changed(normalizer={"type": "Prepend", "prepend": "\u2581"})
    assert not changed(pre_tokenizer=None)
    assert not changed(pre_tokenizer={**definition["pre_tokenizer"], "add_prefix_space": True})
    assert not changed(model={**definition["model"], "dropout": 0.1})
    token = {**definition["added_tokens"][0], "id": 511, "content": "two words"}
    assert not changed(added_tokens=[token])
    assert not changed(added_tokens=[{**token, "content": "<mask>", "lstrip": True}])


def test_a_full_word_cache_changes_nothing(tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_minitron.data import encoder as module

    texts = toy_texts()
    expected = ids(tokenizer, texts)
    monkeypatch.setattr(module, "MAX_CACHE_BYTES", 50_000)
    monkeypatch.setattr(module, "_CACHE_RESET_CHARS", 100_000)
    monkeypatch.setattr(module, "_MAX_CHUNK_CHARS", 100)
    encoder: Encoder = tokenizer.encoder("uint16", "x")
    found = [encoder.encode(texts[start : start + 10]) for start in range(0, len(texts), 10)]
    assert [np.frombuffer(row, np.uint16).tolist() for batch in found for row in batch] == expected
    assert len(encoder._words) < 2000
