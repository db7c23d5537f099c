"""GGUF import: weights, config and tokenizer are unchanged, and damaged files are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from nemo_minitron.errors import CheckpointError
from nemo_minitron.hf.checkpoint import Checkpoint, model_facts
from nemo_minitron.hf.gguf import convert_gguf
from nemo_minitron.hf.gguf_header import read_header
from nemo_minitron.hf.gguf_rope import llama3_factors
from nemo_minitron.hf.gguf_tokenizer import save_tokenizer
from tests.support.tiny_gguf import tiny_gguf
from tests.support.tiny_models import FAMILY_CASES, load_transformers, tiny_model, tiny_model_dir

TEXT = "Hello  world!\n\n\tIt's 1234567 NAÏVE naïve 你好 🙂 don't\r\n x  "


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def _rope_factors(case: str, **keys: Any) -> list[float] | None:
    """Return the factors of llama.cpp's converter: ratios of unscaled to scaled frequencies in transformers."""
    scaling = FAMILY_CASES[case].get("rope_scaling")
    if scaling is None:
        return None
    keys = {"rope_scaling": scaling, **keys}
    scaled, plain = (tiny_model(case, **{**keys, **change}) for change in ({}, {"rope_scaling": None}))
    ratio = plain.base_model.rotary_emb.inv_freq / scaled.base_model.rotary_emb.inv_freq
    return [float(value) for value in ratio]


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_a_converted_model_gives_the_same_logits(case: str, tmp_path: Path, out: Path) -> None:
    source = tiny_model_dir(tmp_path, case)
    file = tiny_gguf(source, tmp_path / "model.gguf", rope_factors=_rope_factors(case))
    assert convert_gguf(file, out, None) == "mit"
    ids = torch.arange(3, 83)[None]
    assert torch.equal(load_transformers(out)(ids).logits, load_transformers(source)(ids).logits)
    assert model_facts(out)["num_params"] == model_facts(source)["num_params"]


def test_quantized_weights_are_dequantized_as_gguf_defines(tmp_path: Path, out: Path) -> None:
    source = tiny_model_dir(tmp_path, "qwen2")
    quantization = gguf.GGMLQuantizationType.Q8_0
    file = tiny_gguf(source, tmp_path / "model.gguf", quantization=quantization)
    convert_gguf(file, out, torch.bfloat16)
    name = "model.layers.2.mlp.gate_proj.weight"
    stored = next(t for t in gguf.GGUFReader(str(file)).tensors if t.name == "blk.2.ffn_gate.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type)).to(torch.bfloat16)
    assert torch.equal(Checkpoint.open(out).read(name), expected)
    assert Checkpoint.open(out).dtypes == {"bfloat16"}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_equal_those_of_transformers(factor: float) -> None:
    scaling = {**FAMILY_CASES["llama31_rope"]["rope_scaling"], "factor": factor}
    expected = _rope_factors("llama31_rope", head_dim=128, rope_scaling=scaling)
    assert llama3_factors(64, 500000.0, factor) == pytest.approx(expected, rel=1e-5)


def test_small_numbers_are_written_in_short_form(tmp_path: Path, out: Path) -> None:
    convert_gguf(tiny_gguf(tiny_model_dir(tmp_path, "mistral"), tmp_path / "model.gguf"), out, None)
    assert '"rms_norm_eps": 1e-05' in (out / "config.json").read_text()


def test_the_tokenizer_encodes_like_the_original_and_keeps_its_special_tokens(tmp_path: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    source = tiny_model_dir(tmp_path, "llama_gqa_tied")
    convert_gguf(tiny_gguf(source, tmp_path / "model.gguf"), out, None)
    original, converted = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out)
    assert converted(TEXT)["input_ids"] == original(TEXT)["input_ids"]
    assert converted.decode(converted(TEXT)["input_ids"]) == TEXT
    assert (converted.bos_token, converted.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert converted.pad_token == "<|endoftext|>"
    assert converted("<|im_end|>")["input_ids"] == [converted.eos_token_id]
    chat = [{"role": "user", "content": "hi"}]
    assert converted.apply_chat_template(chat, tokenize=False) == original.apply_chat_template(chat, tokenize=False)


def test_bos_is_added_only_if_the_file_enables_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tiny_model_dir(tmp_path, "llama_gqa_tied")
    for flag, first in ((0, "Hello"[0]), (1, "<|im_start|>")):
        out = tmp_path / f"out{flag}"
        out.mkdir()
        file = tiny_gguf(source, tmp_path / f"{flag}.gguf", tokenizer__ggml__add_bos_token=flag)
        convert_gguf(file, out, None)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.convert_ids_to_tokens(tokenizer("Hello")["input_ids"])[0].startswith(first)


@pytest.mark.parametrize(("pre", "words"), [("smollm", "1|2|3|4|5"), ("llama-bpe", "123|45"), ("qwen2", "1|2|3|4|5")])
def test_numbers_are_split_by_the_pre_tokenizer_of_the_file(pre: str, words: str, tmp_path: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    convert_gguf(tiny_gguf(tiny_model_dir(tmp_path, "llama_mha"), tmp_path / "model.gguf", pre=pre), out, None)
    tokenizer = AutoTokenizer.from_pretrained(out)
    pieces = [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12345")]
    assert "|".join(pieces) == words
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) == TEXT


@pytest.mark.parametrize("keys", [{"without": ("tokenizer.ggml.pre",)}, {"pre": "default"}], ids=["no key", "default"])
def test_a_file_that_does_not_name_its_pre_tokenizer_is_refused(
    keys: dict[str, Any], tmp_path: Path, out: Path
) -> None:
    """Older converters left it out for Llama 3 and Qwen as well, whose rules differ."""
    file = tiny_gguf(tiny_model_dir(tmp_path, "llama_mha"), tmp_path / "model.gguf", **keys)
    with pytest.raises(CheckpointError, match=r"how its tokenizer splits text .*tokenizer\.ggml\.pre") as caught:
        convert_gguf(file, out, None)
    assert "current llama.cpp" in str(caught.value)
    assert list(out.iterdir()) == []


def test_a_file_with_a_missing_tensor_is_refused(tmp_path: Path, out: Path) -> None:
    source = tiny_model_dir(tmp_path, "llama_mha")
    file = tiny_gguf(source, tmp_path / "model.gguf", leave_out=("model.layers.2.mlp.up_proj.weight",))
    with pytest.raises(CheckpointError, match=r"Tensor blk.2.ffn_up.weight .* \(none: no such tensor\)"):
        convert_gguf(file, out, None)


def test_a_tensor_outside_the_architecture_is_refused(tmp_path: Path, out: Path) -> None:
    folder = tiny_model_dir(tmp_path, "qwen2")
    _edit_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(CheckpointError, match=r"Tensor blk.0.attn_k.bias .* has \(none: no such tensor\)"):
        convert_gguf(tiny_gguf(folder, tmp_path / "model.gguf"), out, None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("intermediate_size", 2**30, r"ffn_down.weight .* has shape \[64, 112\]"),
        ("num_hidden_layers", 9999, "block_count is 9999, there are 4 blocks"),
    ],
)
def test_sizes_that_do_not_fit_the_tensors_are_refused_before_anything_is_loaded(
    key: str, value: int, message: str, tmp_path: Path, out: Path
) -> None:
    folder = tiny_model_dir(tmp_path, "llama_mha")
    _edit_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(tiny_gguf(folder, tmp_path / "model.gguf"), out, None)


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama__rope__scaling__type": "yarn"}, "Rope scaling 'yarn' is not supported"),
        ({"rope_factors": [1.0, 1.0, 2.0, 3.0]}, "not Llama 3.1's"),
        ({"pre": "unheard-of"}, "'unheard-of' is not supported"),
    ],
)
def test_settings_that_transformers_would_ignore_are_refused(
    keys: dict[str, object], message: str, tmp_path: Path, out: Path
) -> None:
    source = tiny_model_dir(tmp_path, "llama_mha")
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(tiny_gguf(source, tmp_path / "model.gguf", **keys), out, None)  # type: ignore[arg-type]


def test_an_unsupported_architecture_is_named(tmp_path: Path, out: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "mamba")
    writer.add_tensor("token_embd.weight", torch.zeros(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture mamba is not supported"):
        convert_gguf(tmp_path / "model.gguf", out, None)


@pytest.mark.parametrize("keep", [0.0, 1e-5, 0.001, 0.01, 0.1, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_refused(keep: float, tmp_path: Path, out: Path) -> None:
    data = tiny_gguf(tiny_model_dir(tmp_path, "llama_mha"), tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="GGUF file cannot be read") as caught:
        convert_gguf(cut, out, None)
    assert caught.value.where == str(cut)
    assert list(out.iterdir()) == []


def test_a_damaged_header_only_raises_checkpoint_errors(tmp_path: Path, out: Path) -> None:
    """The file is refused, unless the flipped byte is in a text without effect."""
    data = tiny_gguf(tiny_model_dir(tmp_path, "llama_mha"), tmp_path / "whole.gguf").read_bytes()
    generator = random.Random(0)
    refused = 0
    for extent in (600, 16000) * 12:
        spoilt = bytearray(data)
        for _ in range(4):
            spoilt[generator.randrange(extent)] ^= 1 << generator.randrange(8)
        (tmp_path / "spoilt.gguf").write_bytes(spoilt)
        try:
            convert_gguf(tmp_path / "spoilt.gguf", out, None)
        except CheckpointError:
            refused += 1
    assert refused > 0


def test_a_file_is_not_blamed_for_missing_memory(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dequantize = gguf.quants.dequantize

    def fail_for_tensors(data: Any, *kind: Any) -> Any:
        if data.nbytes > 1000:
            raise MemoryError("Unable to allocate 2.00 GiB")
        return dequantize(data, *kind)

    file = tiny_gguf(tiny_model_dir(tmp_path, "llama_mha"), tmp_path / "model.gguf")
    monkeypatch.setattr(gguf.quants, "dequantize", fail_for_tensors)
    with pytest.raises(MemoryError):
        convert_gguf(file, out, None)


def test_a_sentencepiece_tokenizer_begins_with_bos_and_round_trips(tmp_path: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    pieces = ["▁", "▁h", "he", "l", "lo", "▁w", "o", "r", "d", "h", "e", "w", "llo", "▁hello", "▁he"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    writer = gguf.GGUFWriter(str(tmp_path / "spm.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(index) for index in range(len(pieces))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_tensor("token_embd.weight", torch.zeros(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_tokenizer(read_header(tmp_path / "spm.gguf").fields, tmp_path / "spm.gguf", out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("hello world é\n  x")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == ["<s>", "▁hello", "▁w"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello world é\n  x"
    assert tokenizer.eos_token == "</s>"


def test_a_damaged_tokenizer_is_refused(tmp_path: Path, out: Path) -> None:
    kind = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    fields = {**kind, "tokenizer.ggml.tokens": ["a", "b"]}
    file = tmp_path / "x.gguf"
    for broken in ({}, {"tokenizer.ggml.merges": ["a c"]}, {"tokenizer.ggml.tokens": ["a", "a"]}):
        with pytest.raises(CheckpointError, match="tokenizer is damaged"):
            save_tokenizer({**fields, **broken}, file, out)
    with pytest.raises(CheckpointError, match=r"tokenizer \(bert\) is not supported"):
        save_tokenizer({"tokenizer.ggml.model": "bert"}, file, out)
