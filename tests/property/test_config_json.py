"""Random contents of config.json and of the index of shards give a model, or an error that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.errors import MinitronError
from nemo_minitron.families import explicit_config, parameters, read_shape
from nemo_minitron.hf.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, CheckpointWriter, read_config
from tests.support.examples import budget
from tests.support.tiny_models import FAMILY_CASES, tiny_config, tiny_model_dir

_WORDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "full_attention", "sliding_attention", "silu")
_ROPE_KEYS = ("rope_type", "type", "factor", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_KEYS = (
    *("architectures", "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "tie_word_embeddings", "hidden_act"),
    *("attention_bias", "mlp_bias", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("quantization_config", "text_config", "eos_token_id", "torch_dtype", "original_max_position_embeddings"),
)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([8192, 131072, 2**31, 10**30, 10**400]),
    st.floats(),
    st.sampled_from([*_WORDS, "", "4096", "LlamaForCausalLM", "qwen2", "é"]),
)
_ROPE = st.dictionaries(st.sampled_from(_ROPE_KEYS), _SCALARS, max_size=4)
_VALUES = st.one_of(
    _SCALARS,
    _ROPE,
    st.dictionaries(st.sampled_from(["full_attention", "sliding_attention"]), _ROPE, max_size=2),
    st.lists(_SCALARS, max_size=4),
)
_CHANGES = st.dictionaries(st.sampled_from(_KEYS), _VALUES, min_size=1, max_size=4)
_LEFT_OUT = st.sets(st.sampled_from(_KEYS), max_size=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model in several files."""
    source = Checkpoint.open(tiny_model_dir(tmp_path_factory.mktemp("models"), "llama_gqa_tied"))
    folder = tmp_path_factory.mktemp("shards")
    writer = CheckpointWriter(folder, source.config, max_shard_bytes=150_000)
    for parameter in parameters(source.shape):
        writer.add(parameter.hf, source.read(parameter.hf))
    writer.close()
    return folder


@given(case=st.sampled_from(sorted(FAMILY_CASES)), changes=_CHANGES, left_out=_LEFT_OUT)
@budget(120)
def test_a_changed_config_is_read_and_written_to_the_same_shape_or_refused(
    case: str, changes: dict[str, Any], left_out: set[str]
) -> None:
    config = {**json.loads(tiny_config(case).to_json_string()), **changes}
    config = {key: value for key, value in config.items() if key not in left_out}
    try:
        shape = read_shape(config, where="somewhere")
    except MinitronError as error:
        _require_where(error, "somewhere")
        return
    written = explicit_config(config)
    assert read_shape(json.loads(json.dumps(written))) == shape
    assert explicit_config(written) == written
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]


def _require_where(error: MinitronError, where: str) -> None:
    assert (error.where or "").startswith(where), error


def _as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


_NESTED = st.recursive(
    _SCALARS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.sampled_from(_KEYS), inner))
)


@given(data=st.one_of(st.binary(max_size=40), _NESTED.map(_as_bytes)))
@budget(30)
def test_any_content_of_the_file_is_an_object_or_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    try:
        assert isinstance(read_config(tmp_path), dict)
    except MinitronError as error:
        _require_where(error, str(tmp_path / "config.json"))


@given(data=st.data())
@budget(30)
def test_a_changed_index_gives_the_same_tensors_or_is_refused(data: st.DataObject, shards: Path) -> None:
    index = json.loads((shards / INDEX_FILE).read_text())
    names, files = sorted(index["weight_map"]), sorted(set(index["weight_map"].values()))
    whole = dict(Checkpoint.open(shards).tensors)
    changed: Any = dict(index["weight_map"])
    for name in data.draw(st.lists(st.sampled_from([*names, "more"]), max_size=3)):
        changed[name] = data.draw(st.one_of(st.sampled_from([*files, "../x", SINGLE_FILE, ""]), _SCALARS))
    for name in data.draw(st.sets(st.sampled_from(names), max_size=2)):
        changed.pop(name, None)
    content = data.draw(
        st.sampled_from([{**index, "weight_map": changed}, {"weight_map": changed}, changed, [changed]])
    )
    folder = shards.parent / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in shards.iterdir():
        (folder / file.name).hardlink_to(file)
    (folder / INDEX_FILE).unlink()
    (folder / INDEX_FILE).write_text(json.dumps(content))
    try:
        found = Checkpoint.open(folder).tensors
    except MinitronError as error:
        _require_where(error, str(folder))
        return
    assert {name: (t.dims, t.dtype) for name, t in found.items()} == {
        name: (t.dims, t.dtype) for name, t in whole.items()
    }
