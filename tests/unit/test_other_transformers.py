"""Folders that other versions of transformers have saved are read alike, and what is written is read alike by them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.families import explicit_config, read_shape
from nemo_minitron.hf.checkpoint import copy_side_files
from nemo_minitron.hf.tokenizer import load_tokenizer
from tests.support.saved_by import IDS_FILE, KINDS, SAVED_BY, VERSIONS
from tests.support.tiny_models import CHAT_TEMPLATE, FAMILY_CASES

MESSAGES: list[Any] = [{"role": "user", "content": "What is 7?"}, {"role": "assistant", "content": "A number."}]


def folder_of(version: str, kind: str, tmp_path: Path) -> Path:
    """With the config of a model, which decides on a class in `AutoTokenizer`."""
    folder = tmp_path / "model"
    shutil.copytree(SAVED_BY / version / kind, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2" if kind == "qwen2" else "llama"}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_tokenizer_makes_the_ids_of_the_version_that_saved_it(version: str, kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, out = folder_of(version, kind, tmp_path), tmp_path / "out"
    expected = json.loads((folder / IDS_FILE).read_text())
    loaded = load_tokenizer(folder)
    assert {text: loaded(text).input_ids for text in expected} == expected
    out.mkdir()
    copy_side_files(folder, out)
    shutil.copy(folder / "config.json", out)
    written: Any = AutoTokenizer.from_pretrained(out)
    assert {text: written(text).input_ids for text in expected} == expected
    assert set(written("x")) == {"input_ids", "attention_mask"}, "transformers 4 makes token_type_ids, too"
    assert (written.bos_token, written.eos_token) == (loaded.bos_token, loaded.eos_token)
    assert written.chat_template == CHAT_TEMPLATE


def test_digits_stay_single_where_the_class_would_join_them() -> None:
    """SmolLM2's tokenizer: transformers 5 builds GPT-2's class without the file's own rules."""
    ids = [load_tokenizer(SAVED_BY / "4.57.6" / kind)("12").input_ids for kind in ("gpt2_digits", "plain")]
    assert [len(found) for found in ids] == [2, 2]
    texts = {kind: json.loads((SAVED_BY / "4.57.6" / kind / IDS_FILE).read_text()) for kind in ("gpt2_digits", "plain")}
    assert texts["gpt2_digits"] != texts["plain"]


@pytest.mark.parametrize(
    ("flags", "before"),
    [
        ({}, ["<s>"]),
        ({"add_bos_token": True}, ["<s>"]),
        ({"add_bos_token": False}, []),
        ({"add_bos_token": False, "backend": "tokenizers"}, ["<s>"]),
        ({"add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}, ["<s>"]),
    ],
)
def test_flags_beside_a_tokenizer_mean_what_transformers_4_takes_them_for(
    flags: dict[str, Any], before: list[str], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder, out = folder_of("4.57.6", "llama", tmp_path), tmp_path / "out"
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["add_bos_token"], config["add_eos_token"]
    file.write_text(json.dumps(config | flags))
    out.mkdir()
    copy_side_files(folder, out)
    shutil.copy(folder / "config.json", out)
    alone = load_tokenizer(folder)("hex", add_special_tokens=False).input_ids
    for tokenizer in (load_tokenizer(folder), AutoTokenizer.from_pretrained(out)):
        ids = tokenizer("hex").input_ids
        assert tokenizer.convert_ids_to_tokens(ids[: len(ids) - len(alone)]) == before
        assert ids[len(before) :] == alone


def test_the_space_before_a_text_is_where_transformers_4_puts_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    plain = load_tokenizer(folder_of("4.57.6", "plain", tmp_path))
    wanted = {True: plain(" fox").input_ids, False: plain("fox").input_ids}
    for number, (stored, flag) in enumerate([(True, None), (False, True), (True, False), (True, True)]):
        folder, out = tmp_path / f"{number}", tmp_path / f"out{number}"
        shutil.copytree(tmp_path / "model", folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        content["pre_tokenizer"]["add_prefix_space"] = stored
        (folder / "tokenizer.json").write_text(json.dumps(content))
        file = folder / "tokenizer_config.json"
        keys = {} if flag is None else {"add_prefix_space": flag}
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
        out.mkdir()
        copy_side_files(folder, out)
        for tokenizer in (load_tokenizer(folder), AutoTokenizer.from_pretrained(out)):
            assert tokenizer("fox").input_ids == wanted[bool(flag)]


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_chats_are_written_alike(kind: str, tmp_path: Path) -> None:
    texts = set()
    for version in VERSIONS:
        template = ChatTemplate.load(folder_of(version, kind, tmp_path / version), "model")
        prompt = template.prompt(MESSAGES[:1])
        texts.add(prompt + template.answer(prompt, MESSAGES))
        assert prompt == template.tokenizer.apply_chat_template(
            MESSAGES[:1], tokenize=False, add_generation_prompt=True
        )
    assert len(texts) == 1


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_configs_of_all_versions_describe_one_model(case: str) -> None:
    files = [SAVED_BY / version / "configs" / case / "config.json" for version in VERSIONS]
    configs = [json.loads(file.read_text()) for file in files]
    assert len({read_shape(config) for config in configs}) == 1
    explicit = [explicit_config({**config, "transformers_version": None}) for config in configs]
    assert all(config == explicit[0] for config in explicit)
