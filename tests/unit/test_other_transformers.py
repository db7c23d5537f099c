"""Compatibility with folders saved by other versions of transformers, and of written folders with those versions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError

from nemo_minitron.data.chat.jinja import render_chat
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.evaluation.generation import load_for_inference
from nemo_minitron.families import explicit_config, read_shape, write_config
from nemo_minitron.hf.checkpoint import CheckpointWriter, copy_side_files
from nemo_minitron.hf.tokenizer import load_tokenizer
from tests.support.saved_by import IDS_FILE, KINDS, SAVED_BY, VERSIONS
from tests.support.tiny_models import CHAT_TEMPLATE, FAMILY_CASES, load_transformers, tiny_config

MESSAGES: list[Any] = [{"role": "user", "content": "What is 7?"}, {"role": "assistant", "content": "A number."}]


def folder_of(version: str, kind: str, tmp_path: Path) -> Path:
    """Copy a folder and add a model config, which influences the class that `AutoTokenizer` chooses."""
    folder = tmp_path / "model"
    shutil.copytree(SAVED_BY / version / kind, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2" if kind == "qwen2" else "llama"}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_tokenizer_gives_the_ids_of_the_version_that_saved_it(version: str, kind: str, tmp_path: Path) -> None:
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


def test_digits_are_split_although_the_class_would_not() -> None:
    """For SmolLM2, transformers 5 builds GPT-2's class and ignores the rules in the file."""
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
def test_flags_of_a_tokenizer_config_act_like_in_transformers_4(
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


def test_the_prefix_space_is_added_like_in_transformers_4(tmp_path: Path) -> None:
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
def test_chats_are_rendered_alike(kind: str, tmp_path: Path) -> None:
    texts = set()
    for version in VERSIONS:
        template = ChatTemplate.load(folder_of(version, kind, tmp_path / version), "model")
        prompt = template.prompt(MESSAGES[:1])
        texts.add(prompt + template.answer(prompt, MESSAGES))
        assert prompt == template.tokenizer.apply_chat_template(
            MESSAGES[:1], tokenize=False, add_generation_prompt=True
        )
    assert len(texts) == 1


TEMPLATES = (
    "{%- for message in messages %}\n    {%- if loop.first %}{{ bos_token }}{% endif %}\n  {{ message['role'] }}\n"
    "{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ eos_token }}{{ pad_token }}|{{ unk_token }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}{{ m.content }}"
    "{% endgeneration %}{{ x is defined }}{% endif %}{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ '<a & b>' | tojson }}{{ dict(a=1) | tojson }}{{ tools is none }}"
    "{{ documents }}",
    "{% macro say(m) %}{{ m.content | trim | upper }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}{{ attributes }}",
)


@pytest.mark.parametrize("jinja", TEMPLATES)
def test_a_template_is_rendered_like_in_transformers(jinja: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of("5.24.0", "plain", tmp_path))
    for prompt in (False, True):
        options: dict[str, Any] = {"add_generation_prompt": prompt, "attributes": {"helpfulness": 4.0}}
        expected = tokenizer.apply_chat_template(MESSAGES, chat_template=jinja, tokenize=False, **options)
        assert render_chat(jinja, MESSAGES, tokenizer, day=date(2026, 1, 2), **options) == expected


@pytest.mark.parametrize(
    "jinja",
    ["{{ raise_exception('no') }}", "{{ namespace(__class__=1) }}", "{% set n = namespace() %}{% set n._a = 1 %}"],
)
def test_a_template_that_raises_or_accesses_internals_is_an_error(jinja: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of("5.24.0", "plain", tmp_path))
    with pytest.raises(TemplateError):
        render_chat(jinja, MESSAGES, tokenizer, day=date(2026, 1, 2), add_generation_prompt=True)


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_configs_of_all_versions_have_the_same_shape(case: str) -> None:
    files = [SAVED_BY / version / "configs" / case / "config.json" for version in VERSIONS]
    configs = [json.loads(file.read_text()) for file in files]
    assert len({read_shape(config) for config in configs}) == 1
    explicit = [explicit_config({**config, "transformers_version": None}) for config in configs]
    assert all(config == explicit[0] for config in explicit)


@torch.no_grad()
def test_a_llama_with_a_hidden_size_not_divisible_by_its_heads_loads_in_every_version(
    tmp_path: Path,
) -> None:
    from transformers import LlamaForCausalLM

    config = tiny_config("llama31_rope", head_dim=8)
    config.hidden_size = 60  # since 5.8 not when the config is made
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    shape = read_shape(tiny_config("llama31_rope").to_dict() | {"hidden_size": 60, "head_dim": 8})
    writer = CheckpointWriter(tmp_path, write_config({"rms_norm_eps": shape.norm_eps}, shape))
    for name, tensor in model.state_dict().items():
        writer.add(name, tensor)
    writer.close()
    ids = torch.arange(3, 83)[None]
    expected = model(ids).logits
    assert torch.equal(load_transformers(tmp_path)(ids).logits, expected)
    assert torch.equal(load_for_inference(tmp_path, "fp32", "cpu")(ids).logits, expected)
    # As older versions of this package, and others, have written it.
    file = tmp_path / "config.json"
    content = {**json.loads(file.read_text()), "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    file.write_text(json.dumps(content))
    assert torch.equal(load_for_inference(tmp_path, "fp32", "cpu")(ids).logits, expected)


def test_only_llama_is_written_with_another_model_type() -> None:
    for case in FAMILY_CASES:
        shape = read_shape(json.loads((SAVED_BY / "5.24.0/configs" / case / "config.json").read_text()))
        assert write_config({}, shape)["model_type"] == shape.family
        odd = write_config({"sliding_window": 8, "rms_norm_eps": shape.norm_eps}, replace(shape, hidden_size=60))
        expected = "mistral" if shape.family == "llama" else shape.family
        assert (odd["model_type"], odd["hidden_size"], odd["head_dim"]) == (expected, 60, shape.kv_channels)
        assert (odd["sliding_window"] is None) == (shape.family == "llama")
        if shape.family == "llama":
            assert read_shape(odd).resized(hidden_size=64) == replace(shape, family=expected), case
