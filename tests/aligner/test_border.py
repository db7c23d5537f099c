"""Hugging Face -> NeMo -> Hugging Face: bit for bit, and with the same logits."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import Cli
from tests.support.aligner import Border, same_tensors
from tests.support.tiny_models import load_transformers, tiny_model_dir

CASES = {
    # NeMo's own converter gets both wrong: positions stretched twice, head size taken for hidden / heads.
    "width-pruned Llama 3.1": ("llama31_rope", {"head_dim": 16}),
    "tied embeddings": ("llama_gqa_tied", {}),
    "mistral": ("mistral", {}),
    "biases of queries, keys and values": ("qwen2", {}),
}


def _check(name: str, tmp_path: Path) -> None:
    case, sizes = CASES[name]
    model = tiny_model_dir(tmp_path, case, dtype=torch.bfloat16, **sizes)
    border = Border(model, tmp_path / "work").cross()
    tokens = torch.randint(0, 400, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_transformers(model)(tokens).logits
    torch.testing.assert_close(border.logits(tokens), expected, atol=1e-4, rtol=0.0)
    assert same_tensors(border.back(tmp_path / "back"), model)


def test_a_width_pruned_llama_31_comes_back_as_it_was(tmp_path: Path) -> None:
    _check("width-pruned Llama 3.1", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "width-pruned Llama 3.1"])
def test_models_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    _check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.assets
def test_smollm2_comes_back_as_it_was(tmp_path: Path, minitron: Cli) -> None:
    root = tmp_path / "runs"
    code, told = minitron("run", "recipes/smollm2_135m/width.yaml", f"execution.run_root={root}", "--until", "teacher")
    assert code == 0, told
    model = root / "smollm2_135m/width/teacher"
    border = Border(model, tmp_path / "work", seq_len_tokens=512).cross()
    tokens = torch.randint(0, 49152, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_transformers(model)(tokens).logits
    torch.testing.assert_close(border.logits(tokens), expected, atol=1e-4, rtol=0.0)
    assert same_tensors(border.back(tmp_path / "back"), model)


@pytest.mark.slow
def test_the_command_packs_and_unpacks(tmp_path: Path, minitron: Cli) -> None:
    model = tiny_model_dir(tmp_path, "llama_gqa_tied", dtype=torch.bfloat16)
    packed = tmp_path / "student.nemo"
    code, told = minitron("convert", model, packed)
    assert code == 0, told
    with tarfile.open(packed) as archive:
        names = archive.getnames()
        file = archive.extractfile("./model_config.yaml")
        assert file is not None
        config = yaml.safe_load(file)
    assert "./tokenizer/tokenizer.json" in names
    assert Path(config["tokenizer"]["type"]).is_dir()
    code, told = minitron("convert", packed, tmp_path / "again", "--like", model)
    assert code == 0, told
    assert same_tensors(tmp_path / "again", model)
    assert "already exists" in minitron("convert", model, packed)[1]
