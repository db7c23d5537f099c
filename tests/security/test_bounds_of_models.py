"""Small model files that would take hours or all memory are refused at once."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families.hf_config import read_shape
from nemo_minitron.hf.gguf_header import read_header
from nemo_minitron.hf.json_file import read_json_object
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.hf.weight_files import stored_tensors
from tests.conftest import REPO

pytestmark = pytest.mark.usefixtures("soon")
TOY_MODEL = REPO / "nemo_minitron" / "toy" / "model"


def _gguf(*arrays: tuple[int, int, bytes], keys: int = 0) -> bytes:
    def text(word: bytes) -> bytes:
        return struct.pack("<Q", len(word)) + word

    out = b"GGUF" + struct.pack("<IQQ", 3, 0, len(arrays) + keys)
    for number, (kind, count, data) in enumerate(arrays):
        out += text(b"k%d" % number) + struct.pack("<IIQ", 9, kind, count) + data
    return out + b"".join(text(b"x%d" % number) + struct.pack("<IB", 0, 1) for number in range(keys))


@pytest.mark.parametrize(
    "data",
    [_gguf((0, 8_000_000, bytes(8_000_000))), _gguf((8, 3_100_000, bytes(24_800_000))), _gguf(keys=50_000)],
    ids=["numbers", "texts", "keys"],
)
def test_a_gguf_header_has_few_values(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"MINITRON_MAX_GGUF_VALUES|at most 10,000"):
        read_header(tmp_path / "model.gguf")


def test_a_safetensors_header_is_bounded_and_never_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    header = json.dumps({"x" * 3_000_000: {"dtype": "y" * 3_000_000, "shape": [], "data_offsets": [0, 0]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError) as caught:
        stored_tensors(tmp_path)
    assert len(str(caught.value)) < 1000
    monkeypatch.setenv("MINITRON_MAX_SAFETENSORS_HEADER_BYTES", "1000000")
    with pytest.raises(CheckpointError, match="MINITRON_MAX_SAFETENSORS_HEADER_BYTES"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"a": ' * 1_000_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "integer"),
        (b'{"a": "' + b"x" * 17_000_000 + b'"}', "MINITRON_MAX_CONFIG_BYTES"),
        (b'{"a": "' + b"x" * 100_000 + b'", "a": 1}', "occurs twice"),
    ],
    ids=["lists", "objects", "digits", "size", "twice"],
)
def test_config_json_is_bounded(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json_object(tmp_path / "config.json")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 300_000_000},
        {"architectures": [["x"]]},
        {"architectures": {"x": 1}},
        {"rope_scaling": "x"},
        {"rope_scaling": ["x"]},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": float("inf")},
        {"rms_norm_eps": -1e-5},
        {"rms_norm_eps": "1e-5"},
        {"rope_theta": float("nan")},
        {"hidden_size": 10**5000},
        {"hidden_act": ["x"] * 100_000},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_values_that_no_model_has_are_refused(changes: dict[str, Any]) -> None:
    config = json.loads((TOY_MODEL / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        read_shape({**config, **changes})
    assert len(str(caught.value)) < 2000


# --- tokenizers -----------------------------------------------------------------------------------


def _tokenizer(folder: Path, **changes: Any) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOY_MODEL / name).read_bytes())
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    return folder


def _doubling(key: str, times: int) -> dict[str, Any]:
    rules = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"} for _ in range(times)]
    return {"type": "Sequence", key: [{"type": "Sequence", key: rules}]}


@pytest.mark.parametrize("key", ["normalizer", "decoder"])
def test_replacements_cannot_multiply_a_text(tmp_path: Path, key: str) -> None:
    folder = _tokenizer(tmp_path, **{key: _doubling(f"{key}s", 40)})
    with pytest.raises(CheckpointError, match="40 rules that make a text up to"):
        load_tokenizer(folder)


@pytest.mark.parametrize("pattern", ["(x+x+)+y"])
def test_a_pattern_that_tries_without_end_is_refused(tmp_path: Path, pattern: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    with pytest.raises(CheckpointError, match="by a pattern that exceeds the retry limit on 64 characters"):
        load_tokenizer(_tokenizer(tmp_path, pre_tokenizer=split))
