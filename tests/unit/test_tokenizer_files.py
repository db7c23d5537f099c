"""Variants of tokenizer files: reading, repair, and refusal."""

from __future__ import annotations

import json
import logging
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.data.chat.render import sft_rows
from nemo_minitron.data.chat.rows import BadRow
from nemo_minitron.data.chat.templates import set_template
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.data.tokenization import DocumentTokenizer
from nemo_minitron.errors import CheckpointError, DataError
from nemo_minitron.hf.checkpoint import copy_side_files
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.hf.tokenizer_files import LLAMA3_PATTERN, TEKKEN_PATTERN
from nemo_minitron.hf.tokenizer_writer import write_tokenizer
from nemo_minitron.plan.fingerprint import params_of
from nemo_minitron.schema.chats import ChatRendering
from nemo_minitron.stages.align.params import SftStage
from tests.support.saved_by import SAVED_BY, edit, saved
from tests.support.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

TEXT = "The quick brown fox <|im_end|> jumps over 12 dogs."
CHAT = {
    "messages": [
        {"role": "user", "content": "What does the fox do?"},
        {"role": "assistant", "content": "It jumps over the dog. " * 20},
    ]
}
TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 300},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}


def as_version_5(folder: Path) -> None:
    """Copy the tokenizer files that transformers 5 writes."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    shutil.copytree(SAVED_BY / "5.24.0/plain", folder, dirs_exist_ok=True)


def only_definition(folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)


def with_marks(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())


CHANGES: dict[str, Any] = {
    "as saved": lambda folder: None,
    "version 5": as_version_5,
    "unknown class": lambda folder: edit(
        folder / "tokenizer_config.json", tokenizer_class="OurTokenizer", auto_map={"AutoTokenizer": ["evil.T", None]}
    ),
    "slow class alone": lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer"),
    "class is a number": lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class=5),
    "no class": lambda folder: edit(folder / "tokenizer_config.json", drop=("tokenizer_class",)),
    "list of tokens only": lambda folder: edit(
        folder / "tokenizer_config.json", extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    ),
    "needs sentencepiece": lambda folder: edit(
        folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_prefix_space=False, add_bos_token=False
    ),
    "only tokenizer.json": only_definition,
    "byte order marks": with_marks,
    "truncation": lambda folder: edit(folder / "tokenizer.json", truncation=TRUNCATION),
    "padding": lambda folder: edit(folder / "tokenizer.json", padding=PADDING),
    "token as a dict": lambda folder: edit(
        folder / "tokenizer_config.json",
        bos_token={"__type": "AddedToken", "content": "<|endoftext|>"},
    ),
    "no length": lambda folder: edit(folder / "tokenizer_config.json", model_max_length=1e30),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_variant_gives_the_same_ids_before_and_after_writing(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    folder = saved(tmp_path / "model")
    CHANGES[name](folder)
    wanted = tiny_tokenizer()(TEXT).input_ids
    loaded = load_tokenizer(folder)
    assert loaded(TEXT).input_ids == loaded.backend_tokenizer.encode(TEXT).ids == wanted
    assert loaded.eos_token == "<|endoftext|>"
    assert DocumentTokenizer.load(folder, 512).eod_id == 0

    out = tmp_path / "out"
    out.mkdir()
    copy_side_files(folder, out)
    written: Any = AutoTokenizer.from_pretrained(str(out))
    assert written.backend_tokenizer.encode(TEXT).ids == wanted, "plain transformers reads what was written"
    assert written.eos_token == "<|endoftext|>"
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert not {"auto_map", "backend"} & config.keys()
    assert isinstance(config.get("extra_special_tokens", {}), dict), "version 4 reads a dict, version 5 too"


def test_a_vocabulary_with_merges_is_sufficient(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 512}))
    model = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{' '.join(merge)}\n" for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    text = "The quick brown fox"
    assert load_tokenizer(folder)(text).input_ids == tiny_tokenizer()(text).input_ids


def test_files_without_repairs_are_copied_byte_for_byte(tmp_path: Path) -> None:
    folder, out = saved(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    assert copy_side_files(folder, out) == []
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()


def test_named_templates_are_copied_and_removed_with_a_new_template(tmp_path: Path) -> None:
    folder, out = saved(tmp_path / "model"), tmp_path / "out"
    (folder / "generation_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    out.mkdir()
    copy_side_files(folder, out)
    assert load_tokenizer(out).chat_template == {"default": CHAT_TEMPLATE, "tool_use": "{{ tools }}"}
    assert ChatTemplate.load(out, "model").jinja == CHAT_TEMPLATE
    set_template(out, "chatml")
    assert isinstance(load_tokenizer(out).chat_template, str)


@pytest.mark.parametrize("change", [{"truncation": TRUNCATION}, {"padding": PADDING}])
def test_chat_rows_are_not_truncated(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = saved(tmp_path / "model")
    wanted = LengthStats()
    sft_rows(CHAT, ChatTemplate.load(folder, "model"), ChatRendering(), wanted)
    edit(folder / "tokenizer.json", **change)
    found = LengthStats()
    assert len(sft_rows(CHAT, ChatTemplate.load(folder, "model"), ChatRendering(), found)) == 1
    assert found.sequence_tokens == wanted.sequence_tokens
    assert found.sequence_tokens[0] > 100
    assert sft_rows(CHAT, ChatTemplate.load(folder, "model"), ChatRendering(max_seq_len_tokens=100)) == []


def test_a_tokenizer_that_appends_eos_does_not_append_it_to_a_prompt(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    ids = [("<|im_start|>", 1), ("<|endoftext|>", 0)]
    template = {
        "type": "TemplateProcessing",
        "single": [_special("<|im_start|>"), {"Sequence": {"id": "A", "type_id": 0}}, _special("<|endoftext|>")],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in ids},
    }
    edit(folder / "tokenizer.json", post_processor=template)
    assert load_tokenizer(folder)("fox").input_ids == [1, *tiny_tokenizer()("fox").input_ids]


def _special(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


# --- errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "The model folder has no tokenizer"),
        ({"tokenizer_config.json": "{}"}, "The model folder has no tokenizer"),
        ({"tokenizer.json": "[]"}, "tokenizer.json is damaged"),
        ({"tokenizer.json": '{"a": '}, "tokenizer.json is damaged"),
        ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "cannot be loaded"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "["}, "tokenizer_config.json is damaged"),
        ({"vocab.json": '{"a": 0}'}, "cannot be loaded"),
    ],
)
def test_the_error_for_an_unreadable_tokenizer_is_short(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 512}))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message) as found:
        load_tokenizer(tmp_path)
    assert len(str(found.value)) < 600


def test_the_error_for_a_sentencepiece_model_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_minitron.hf.tokenizer.find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x05")
    with pytest.raises(CheckpointError, match="pip install sentencepiece, or add") as found:
        load_tokenizer(tmp_path)
    assert len(str(found.value)) < 400


# --- Mistral's pattern ----------------------------------------------------------------------------


def split_by(pattern: str, folder: Path, model_type: str, vocab_size: int) -> Path:
    """Create a Mistral tokenizer that splits text by a pattern."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocab = {token: number for number, token in enumerate([*"abcdefghAB123", *(f"z{i}" for i in range(vocab_size))])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    folder.mkdir()
    write_tokenizer(folder, backend, {"eos_token": "[INST]"})
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "4.57.6"}))
    return folder


def pattern_of(tokenizer: Any) -> str:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return str(content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"])


@pytest.mark.parametrize(
    ("model_type", "pattern", "wanted", "vocab_size"),
    [
        # transformers warns from 100,000 tokens on.
        ("llama", LLAMA3_PATTERN, LLAMA3_PATTERN, 100_001),
        ("mistral", LLAMA3_PATTERN, TEKKEN_PATTERN, 50),
        ("mistral", TEKKEN_PATTERN, TEKKEN_PATTERN, 50),
    ],
)
def test_only_a_wrong_pattern_of_mistral_is_replaced_and_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model_type: str, pattern: str, wanted: str, vocab_size: int
) -> None:
    folder, out = split_by(pattern, tmp_path / "model", model_type, vocab_size), tmp_path / "out"
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        assert pattern_of(load_tokenizer(folder)) == wanted
    assert "regex" not in caplog.text
    out.mkdir()
    notes = copy_side_files(folder, out)
    assert bool(notes) == (pattern != wanted), "a change is said"
    assert pattern_of(load_tokenizer(out)) == wanted


# --- ids and embeddings ---------------------------------------------------------------------------


def test_template_tokens_beyond_the_embeddings_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", vocab_size=2)
    with pytest.raises(DataError, match=r"marker <\|im_end\|> has id 2, beyond the model's vocabulary of 2"):
        ChatTemplate.load(folder, "model")
    with pytest.raises(DataError, match="resize the embeddings"):
        ChatTemplate.load(folder, "chatml")
    edit(folder / "config.json", vocab_size=300)
    with pytest.raises(DataError, match=r"Token '.*' has id \d+, beyond the model's vocabulary of 300"):
        sft_rows(CHAT, ChatTemplate.load(folder, "model"))


def test_chat_refuses_ids_beyond_the_embeddings(tmp_path: Path) -> None:
    from nemo_minitron.cli.chat import chat

    folder = saved(tmp_path / "model", vocab_size=2)
    with pytest.raises(DataError, match="marker"):
        chat(folder, once="hello")


# --- dates in templates --------------------------------------------------------------------------------------

DATED = (
    "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- else %}{%- set day = '?' %}"
    "{%- endif %}{{- 'Today Date: ' + day + '\\n' }}" + CHAT_TEMPLATE
)


def dated(folder: Path) -> Path:
    saved(folder)
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


def test_a_template_with_a_date_gets_a_fixed_day(tmp_path: Path) -> None:
    folder = dated(tmp_path / "model")
    (row,) = sft_rows(CHAT, ChatTemplate.load(folder, "model"))
    assert row["input"].startswith("Today Date: 26 Jul 2024\n<|im_start|>user")
    (row,) = sft_rows(CHAT, ChatTemplate.load(folder, "model", day=date(2031, 2, 3)))
    assert row["input"].startswith("Today Date: 03 Feb 2031\n")


def test_the_fingerprint_includes_the_day_and_that_of_old_runs_is_unchanged() -> None:
    keys: dict[str, Any] = {"kind": "sft", "inputs": {"model": "student"}, "global_batch_size": 2, "lr": 1e-4}
    plain = SftStage(**keys, max_seq_len_tokens=64)
    other = SftStage(**keys, max_seq_len_tokens=64, template_date="2031-02-03")
    assert "template_date" not in params_of(plain)
    assert params_of(other) == params_of(plain) | {"template_date": "2031-02-03"}


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{{ [1, 2] | random }}", "output changes each time"),
        ("{{ lipsum() }}", "output changes each time"),
        ("{% for %}", "not valid Jinja"),
    ],
)
def test_a_template_that_does_not_depend_only_on_the_messages_is_refused(
    tmp_path: Path, jinja: str, message: str
) -> None:
    folder = saved(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(jinja)
    with pytest.raises(DataError, match=message):
        ChatTemplate.load(folder, "model")


@pytest.mark.parametrize("jinja", ["{{ 1 / 0 }}", "{{ messages[0]['content'] + 1 }}", "{{ range(10 ** 9) }}"])
def test_a_template_that_fails_makes_the_row_invalid(tmp_path: Path, jinja: str) -> None:
    folder = saved(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(jinja)
    with pytest.raises(BadRow, match="the chat template refuses the messages"):
        sft_rows(CHAT, ChatTemplate.load(folder, "model"))
