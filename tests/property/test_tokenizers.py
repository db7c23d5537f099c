"""Randomly changed tokenizer files load or give a reason; ids never depend on limits in them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.data.chat.render import sft_rows
from nemo_minitron.data.chat.rows import BadRow
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import MinitronError
from nemo_minitron.hf.checkpoint import copy_side_files
from nemo_minitron.hf.source import BUILT_IN
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.hf.tokenizer_identity import tokenizer_fingerprint
from tests.support.examples import budget

SOURCE = BUILT_IN["toy-llama"]
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
ROW = {"messages": [{"role": "user", "content": "hello 12"}, {"role": "assistant", "content": "the hound"}]}

values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**6) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
CONFIG_KEYS = (
    *("tokenizer_class", "backend", "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"),
    *("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length", "add_bos_token", "add_prefix_space"),
    *("auto_map", "chat_template", "clean_up_tokenization_spaces", "legacy", "split_special_tokens", "padding_side"),
)
TOKENIZER_KEYS = ("truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
classes = st.sampled_from(["TokenizersBackend", "LlamaTokenizer", "GPT2TokenizerFast", "Unknown", "PythonBackend"])
changes = st.fixed_dictionaries(
    {},
    optional={
        "tokenizer_config.json": st.dictionaries(st.sampled_from(CONFIG_KEYS), classes | values, max_size=4),
        "tokenizer.json": st.dictionaries(st.sampled_from((*TOKENIZER_KEYS, "model", "version")), values, max_size=2),
        "special_tokens_map.json": st.dictionaries(st.sampled_from(CONFIG_KEYS), values, max_size=2),
    },
)
templates = st.lists(
    st.sampled_from(
        [
            "{% for message in messages %}",
            "{% endfor %}",
            "{{ message['content'] }}",
            "{{ messages[0]['content'] }}",
            "{{ strftime_now('%d') }}",
            "{{ bos_token }}",
            "{{ eos_token }}",
            "{% if add_generation_prompt %}",
            "{% endif %}",
            "{{ 1 / 0 }}",
            "{{ messages | random }}",
            "{{ raise_exception('no') }}",
            "{% generation %}",
            "{% endgeneration %}",
            "{{ messages.append(1) }}",
            "text",
        ]
    ),
    max_size=8,
).map("".join)


@contextmanager
def changed(files: dict[str, dict[str, Any]], raw: dict[str, bytes] | None = None) -> Iterator[Path]:
    """Generate changes of the toy model's tokenizer: other keys, and other whole files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        for file in FILES:
            if (SOURCE / file).is_file():
                shutil.copyfile(SOURCE / file, folder / file)
        for file, keys in files.items():
            before = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
            (folder / file).write_text(json.dumps(before | keys))
        for file, content in (raw or {}).items():
            (folder / file).write_bytes(content)
        yield folder


@budget(25)
@given(changes, st.dictionaries(st.sampled_from(FILES[:3]), st.binary(max_size=8), max_size=1))
def test_changed_files_load_or_say_why(files: dict[str, dict[str, Any]], raw: dict[str, bytes]) -> None:
    with changed(files, raw) as folder:
        try:
            ids = load_tokenizer(folder)("The hound 12").input_ids
            tokenizer_fingerprint(folder)
        except MinitronError:
            return
        out = folder.parent / "out"
        out.mkdir()
        copy_side_files(folder, out)
        assert load_tokenizer(out)("The hound 12").input_ids == ids


@budget(25)
@given(st.text(max_size=60), st.integers(1, 80), st.integers(1, 80), st.sampled_from(["Left", "Right"]))
def test_ids_never_depend_on_truncation_or_padding(text: str, longest: int, padded: int, side: str) -> None:
    limits = {
        "truncation": {"direction": side, "max_length": longest, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": padded},
            "direction": side,
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    }
    with changed({"tokenizer.json": limits}) as folder:
        limited, whole = load_tokenizer(folder), load_tokenizer(SOURCE)
        for add in (True, False):
            wanted = whole.backend_tokenizer.encode(text, add_special_tokens=add).ids
            assert limited.backend_tokenizer.encode(text, add_special_tokens=add).ids == wanted


@budget(25)
@given(templates)
def test_any_template_renders_or_gives_a_reason(jinja: str) -> None:
    with changed({}, {"chat_template.jinja": jinja.encode()}) as folder:
        try:
            bound = ChatTemplate.load(folder, "model")
            first = sft_rows(ROW, bound)
        except (BadRow, MinitronError):
            return
        assert sft_rows(ROW, bound) == first
