"""Random keys of a GGUF file give a model that can be opened, or an error that names the file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.errors import MinitronError
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.hf.gguf import convert_gguf
from tests.support.examples import budget
from tests.support.tiny_gguf import tiny_gguf
from tests.support.tiny_models import tiny_model_dir

_SIZES = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention__head_count_kv")
_KEYS = (
    *(f"llama__{key}" for key in (*_SIZES, "attention__head_count", "attention__key_length", "expert_count")),
    *(
        f"llama__rope__{key}"
        for key in ("dimension_count", "freq_base", "scale_linear", "scaling__type", "scaling__factor")
    ),
    *("general__type", "general__architecture", "general__alignment", "general__license", "split__no", "split__count"),
    *(f"tokenizer__ggml__{key}" for key in ("model", "pre", "bos_token_id", "eos_token_id", "add_bos_token", "tokens")),
    *(
        "tokenizer__ggml__merges",
        "tokenizer__ggml__token_type",
        "tokenizer__chat_template",
        "tokenizer__chat_templates",
    ),
)
_VALUES = st.one_of(
    st.integers(0, 9),
    st.sampled_from([64, 512, 2**32 - 1]),
    st.floats(width=32),
    st.sampled_from(["", "linear", "none", "yarn", "llama", "qwen2", "nemotron", "gpt2", "adapter", "{{ x }}", "é"]),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.lists(st.sampled_from(["a", "b", "a b"]), min_size=1, max_size=3),
)
_DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models"), "llama_mha", num_hidden_layers=1)


@given(
    fields=st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=2),
    factors=st.one_of(st.none(), st.lists(st.floats(width=32), max_size=4)),
    damage=_DAMAGE,
    extent=st.sampled_from([64, 600, 16000]),
)
@budget(20)
def test_a_changed_file_is_converted_or_refused(
    fields: dict[str, Any], factors: list[float] | None, damage: list[tuple[float, int]], extent: int, llama: Path
) -> None:
    file, out = llama.parent / "model.gguf", llama.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    tiny_gguf(llama, file, rope_factors=factors or None, **fields)
    content = bytearray(file.read_bytes())
    for place, bits in damage:
        content[int(place * extent)] ^= bits
    file.write_bytes(content)
    try:
        convert_gguf(file, out, None)
    except MinitronError as error:
        refused = error
    else:
        Checkpoint.open(out)
        return
    assert (refused.where or "").startswith(str(file)), refused
