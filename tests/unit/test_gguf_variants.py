"""Variants of GGUF files (old keys, split files, adapters, other versions): read correctly, or refused by name."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import read_shape
from nemo_minitron.hf.checkpoint import read_config
from nemo_minitron.hf.gguf import convert_gguf
from nemo_minitron.hf.source import resolve_model
from tests.support.tiny_gguf import tiny_gguf
from tests.support.tiny_models import tiny_model_dir


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models"), "llama_mha")


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models"), "nemotron")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def _refusal(file: Path, out: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        convert_gguf(file, out, None)
    assert caught.value.where is not None
    assert caught.value.where.startswith(str(file))
    assert list(out.iterdir()) == []
    return caught.value


SCALED: dict[str, dict[str, Any]] = {
    "linear": {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0},
    "old key": {"llama__rope__scale_linear": 4.0},
    "factor without type": {"llama__rope__scaling__factor": 4.0},
    "both keys": {"llama__rope__scaling__factor": 2.0, "llama__rope__scale_linear": 1.0},
    "yarn": {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 1.0},
    "longrope": {"llama__rope__scaling__type": "longrope"},
}


@pytest.mark.parametrize("case", SCALED)
def test_rope_scaling_is_refused_under_every_key(case: str, llama: Path, tmp_path: Path, out: Path) -> None:
    error = _refusal(tiny_gguf(llama, tmp_path / "model.gguf", **SCALED[case]), out)
    assert error.what.startswith("Rope scaling")
    assert "again" not in str(error)


NOT_SCALED: dict[str, dict[str, Any]] = {
    "linear by 1": {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 1.0},
    "linear, no factor": {"llama__rope__scaling__type": "linear"},
    "old key, 1": {"llama__rope__scale_linear": 1.0},
    "factor 0": {"llama__rope__scaling__factor": 0.0},
    "none with a factor": {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0},
    "factors of 1": {"rope_factors": [1.0] * 4},
}


@pytest.mark.parametrize("case", NOT_SCALED)
def test_scaling_that_llama_cpp_ignores_is_accepted(case: str, llama: Path, tmp_path: Path, out: Path) -> None:
    convert_gguf(tiny_gguf(llama, tmp_path / "model.gguf", **NOT_SCALED[case]), out, None)
    assert read_shape(read_config(out)) == read_shape(read_config(llama))


def test_the_config_is_written_for_transformers_4_and_5(llama: Path, tmp_path: Path, out: Path) -> None:
    convert_gguf(tiny_gguf(llama, tmp_path / "model.gguf", llama__rope__freq_base=250000.0), out, None)
    config = read_config(out)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 250000.0
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLM"], "llama")


def test_partial_rotary_embeddings_of_llama_are_refused(llama: Path, tmp_path: Path, out: Path) -> None:
    error = _refusal(tiny_gguf(llama, tmp_path / "model.gguf", llama__rope__dimension_count=4), out)
    assert "rope.dimension_count = 4 of 8 channels" in error.what


def test_nemotron_is_read_with_the_keys_of_its_converter(nemotron: Path, tmp_path: Path, out: Path) -> None:
    file = tiny_gguf(
        nemotron,
        tmp_path / "model.gguf",
        without=("nemotron.attention.layer_norm_rms_epsilon", "nemotron.attention.key_length"),
        nemotron__attention__layer_norm_epsilon=3e-5,
    )
    convert_gguf(file, out, None)
    shape = read_shape(read_config(out))
    assert (shape.norm_eps, shape.rotary_fraction) == (3e-5, 0.5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"without": ("llama.attention.layer_norm_rms_epsilon",)}, "no key llama.attention.layer_norm_rms_epsilon"),
        ({"without": ("tokenizer.ggml.model",)}, "no tokenizer"),
        ({"general__type": "adapter"}, "an adapter (LoRA)"),
        ({"general__type": "mmproj"}, "the projector of a multimodal model"),
        ({"general__type": "imatrix"}, "of type 'imatrix'"),
        ({"general__architecture": "clip"}, "the projector of a multimodal model"),
        ({"general__architecture": "gemma3"}, "architecture gemma3 is not supported"),
        ({"llama__expert_count": 8}, "a mixture of 8 experts"),
        ({"llama__rope__freq_base": "fast"}, "llama.rope.freq_base = 'fast' is not a number"),
        ({"llama__rope__scaling__factor": float("nan")}, "llama.rope.scaling.factor = nan is not a number"),
        ({"split__no": 2, "split__count": 4}, "part 3 of 4 of a split file"),
    ],
)
def test_a_file_that_is_not_a_model_is_described(
    keys: dict[str, Any], words: str, llama: Path, tmp_path: Path, out: Path
) -> None:
    if "llama__rope__freq_base" in keys:
        keys = {**keys, "rope_factors": [2.0] * 4}
    error = _refusal(tiny_gguf(llama, tmp_path / "model.gguf", **keys), out)
    assert words in error.what
    assert "again" not in str(error)


def test_a_vocabulary_and_an_adapter_of_another_program_are_refused(tmp_path: Path, out: Path) -> None:
    for name, tensors, words in (("vocab", (), "only a vocabulary"), ("lora", ("blk.0.a.weight.lora_a",), "(LoRA)")):
        writer = gguf.GGUFWriter(str(tmp_path / f"{name}.gguf"), "llama")
        for tensor in tensors:
            writer.add_tensor(tensor, np.ones((2, 2), np.float32))
        _write(writer)
        assert words in _refusal(tmp_path / f"{name}.gguf", out).what


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    folder.mkdir()
    writer = gguf.GGUFWriter(str(folder / "m.gguf"), "llama", split_max_tensors=2)
    writer.add_block_count(4)
    for name in "abcdef":
        writer.add_tensor(f"blk.0.{name}.weight", np.ones((2, 2), np.float32))
    _write(writer)
    return folder


def test_the_error_for_a_split_file_contains_the_merge_command(parts: Path, tmp_path: Path, out: Path) -> None:
    for number in (1, 2, 3):
        error = _refusal(parts / f"m-0000{number}-of-00003.gguf", out)
        assert error.what == f"m-0000{number}-of-00003.gguf is part {number} of 3 of a split file."
        assert error.next_step is not None
        assert error.next_step.endswith("llama-gguf-split --merge m-00001-of-00003.gguf m.gguf")
    assert resolve_model(str(parts), tmp_path, None).name == "m-00001-of-00003.gguf"


def test_quantizations_in_one_folder_are_listed_without_their_later_parts(parts: Path, tmp_path: Path) -> None:
    shutil.copyfile(parts / "m-00001-of-00003.gguf", parts / "m.Q8_0.GGUF")
    with pytest.raises(CheckpointError, match=r"contains 2 .gguf files") as caught:
        resolve_model(str(parts), tmp_path, None)
    assert caught.value.allowed == "m-00001-of-00003.gguf, m.Q8_0.GGUF"


def test_the_suffix_is_case_insensitive(llama: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = tiny_gguf(llama, tmp_path / "folder" / "MODEL.GGUF")
    assert resolve_model(str(file), tmp_path, None) == resolve_model(str(file.parent), tmp_path, None) == file
    convert_gguf(file, out, None)


def test_several_chat_templates_are_converted(llama: Path, tmp_path: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    file = tiny_gguf(
        llama,
        tmp_path / "model.gguf",
        tokenizer__chat_templates=["tool_use"],
        tokenizer__chat_template__tool_use="{{ 'tools' }}",
    )
    convert_gguf(file, out, None)
    templates = AutoTokenizer.from_pretrained(out).chat_template
    assert templates["tool_use"] == "{{ 'tools' }}"
    assert "im_start" in templates["default"]


@pytest.mark.parametrize("name", ["../../../planted", "/planted", "a/b", "", ".", "x" * 65])
def test_a_template_name_with_a_path_is_refused(name: str, llama: Path, tmp_path: Path, out: Path) -> None:
    """CVE-2026-9856: transformers before 5.10 writes the template to any path that its name contains."""
    fields = {"tokenizer__chat_templates": [name], f"tokenizer__chat_template__{name}": "text"}
    with pytest.raises(CheckpointError, match="a chat template has the invalid name"):
        convert_gguf(tiny_gguf(llama, tmp_path / "model.gguf", **fields), out, None)
    assert not list(tmp_path.rglob("*planted*"))


def _version(file: Path, version: int) -> None:
    data = bytearray(file.read_bytes())
    data[4:8] = struct.pack("<I", version)
    file.write_bytes(data)


def _kind_of_first_tensor(file: Path, kind: int) -> None:
    """Change the type in the header entry of the first tensor."""
    data = bytearray(file.read_bytes())
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", kind)
    file.write_bytes(data)


def _old_format(file: Path) -> None:
    file.write_bytes(b"tjgg" + file.read_bytes()[4:])


def _pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: _version(file, 1), "has version 1"),
        (lambda file: _version(file, 4), "has version 4"),
        (_old_format, "before GGUF"),
        (_pointer, "Git LFS pointer"),
        (lambda file: file.write_text("<!DOCTYPE html>\n<p>Log in"), "a web page"),
        (lambda file: _kind_of_first_tensor(file, 24), "type I8, which"),
        (lambda file: _kind_of_first_tensor(file, 4), "type number 4, which"),
        (lambda file: _kind_of_first_tensor(file, 4711), "type number 4711, which"),
    ],
    ids=["version 1", "version 4", "GGML", "LFS", "page", "whole numbers", "removed type", "unknown type"],
)
def test_other_formats_are_not_reported_as_damaged(
    spoil: Any, words: str, llama: Path, tmp_path: Path, out: Path
) -> None:
    file = tiny_gguf(llama, tmp_path / "model.gguf")
    spoil(file)
    error = _refusal(file, out)
    assert words in error.what
    assert "damaged" not in str(error)


def test_the_error_for_a_big_endian_file_contains_the_conversion_command(
    llama: Path, tmp_path: Path, out: Path
) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "big.gguf"), "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    _write(writer)
    error = _refusal(tmp_path / "big.gguf", out)
    assert "big-endian" in error.what
    assert error.next_step is not None
    assert "gguf_convert_endian" in error.next_step


@pytest.mark.parametrize("alignment", [0, 24])
def test_an_invalid_alignment_is_reported_as_damage(alignment: int, llama: Path, tmp_path: Path, out: Path) -> None:
    error = _refusal(tiny_gguf(llama, tmp_path / "model.gguf", general__alignment=alignment), out)
    assert f"general.alignment = {alignment} is not a power of two" in error.what
