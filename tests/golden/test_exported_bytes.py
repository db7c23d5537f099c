"""Exported files have the same bytes under every version of transformers, tokenizers and safetensors.

After a wanted change: UPDATE_GOLDEN=1 pytest tests/golden.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.data.chat.templates import set_template
from nemo_minitron.families import parameters, read_shape, tensor_shape
from nemo_minitron.hf.checkpoint import CheckpointWriter, copy_side_files, model_facts
from nemo_minitron.hf.gguf import convert_gguf
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.artifacts import Model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.export.params import ExportStage
from nemo_minitron.stages.export.run import Inputs as ExportInputs
from nemo_minitron.stages.export.run import export
from nemo_minitron.stages.init.params import InitStage
from nemo_minitron.stages.init.run import Inputs as InitInputs
from nemo_minitron.stages.init.run import init
from nemo_minitron.system.progress import Progress
from tests.support.saved_by import IDS_FILE, KINDS, SAVED_BY, VERSIONS
from tests.support.tiny_gguf import tiny_gguf
from tests.support.tiny_models import FAMILY_CASES, load_transformers

REPO = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("exported_bytes.json")
TOKENIZER_OF = {"qwen2": "qwen2", "qwen25_tied": "qwen2", "llama_gqa_tied": "gpt2_digits", "mistral": "llama"}


def saved_model(version: str, case: str, folder: Path) -> Path:
    """Write a model with the files of a version, and with weights that are not random."""
    shutil.copytree(SAVED_BY / version / "configs" / case, folder)
    shutil.copytree(SAVED_BY / version / TOKENIZER_OF.get(case, "plain"), folder, dirs_exist_ok=True)
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    shape = read_shape(config)
    writer = CheckpointWriter(folder, config, dtype=torch.float32)
    for number, parameter in enumerate(parameters(shape)):
        size = tensor_shape(shape, parameter.row)
        values = torch.arange(number, number + torch.Size(size).numel(), dtype=torch.float32)
        writer.add(parameter.hf, ((values * 37 % 101 - 50) / 400).reshape(size))
    writer.close()
    (folder / "config.json").write_text(text)
    (folder / IDS_FILE).unlink()
    return folder


def context(out: Path) -> StageContext:
    out.mkdir()
    return StageContext("export", "a/recipe", out, out.parent, Execution(), Progress(silent=True))


def exported(model: Path, out: Path) -> Path:
    facts = {**model_facts(model), "license": "apache-2.0", "source": "hf:org/teacher"}
    inputs = ExportInputs(*(Model(role, "import", model, "f" * 64, facts) for role in ("model", "teacher")))
    export(ExportStage(kind="export", dtype="bfloat16"), inputs, context(out))
    return out


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


def compare(name: str, folder: Path) -> None:
    known = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        known[name] = hashes(folder)
        GOLDEN.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    assert hashes(folder) == known[name]


@pytest.mark.parametrize("case", FAMILY_CASES)
@pytest.mark.parametrize("version", VERSIONS)
def test_an_exported_model_has_the_same_bytes(version: str, case: str, tmp_path: Path) -> None:
    compare(f"{case} saved by {version}", exported(saved_model(version, case, tmp_path / "model"), tmp_path / "out"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_side_files_have_the_same_bytes_with_a_template_of_ours(version: str, kind: str, tmp_path: Path) -> None:
    copy_side_files(SAVED_BY / version / kind, tmp_path)
    shutil.copy(SAVED_BY / version / "configs/llama_mha/config.json", tmp_path)
    set_template(tmp_path, "chatml")
    compare(f"side files {kind} saved by {version}", tmp_path)


@pytest.mark.parametrize("case", ["llama31_rope", "qwen25_tied", "nemotron"])
def test_a_converted_gguf_file_has_the_same_bytes(case: str, tmp_path: Path) -> None:
    model = saved_model("4.57.6", case, tmp_path / "model")
    (tmp_path / "out").mkdir()
    if not (model / "chat_template.jinja").is_file():
        (model / "chat_template.jinja").write_text("{{ messages }}")
    convert_gguf(tiny_gguf(model, tmp_path / "model.gguf"), tmp_path / "out", torch.bfloat16)
    compare(f"gguf {case}", tmp_path / "out")


def test_a_new_tokenizer_has_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 9}))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    params = InitStage(
        kind="init",
        architecture={"architectures": ["LlamaForCausalLM"], "vocab_size": 280, **sizes},
        tokenizer={"vocab_size": 280, "sources": [{"source": str(tmp_path / "text.jsonl")}]},
    )
    init(params, InitInputs(), context(tmp_path / "out"))
    (tmp_path / "out/model.safetensors").unlink()  # random numbers of torch
    compare("init", tmp_path / "out")


_OTHER = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).float().eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.loads(sys.argv[2])
with torch.no_grad():
    logits = model(torch.arange(3, 83)[None]).logits.double().sum(-1)[0].tolist()
ids = {text: tokenizer(text).input_ids for text in texts}
print(json.dumps({"version": transformers.__version__, "logits": logits, "ids": ids}))
"""


@pytest.mark.slow
@pytest.mark.skipif("MINITRON_OTHER_TRANSFORMERS" not in os.environ, reason="names no folder with another version")
@pytest.mark.parametrize("case", FAMILY_CASES)
def test_another_version_loads_what_this_one_exports(case: str, tmp_path: Path) -> None:
    """MINITRON_OTHER_TRANSFORMERS: a folder for PYTHONPATH, by `pip install --no-deps --target` with its hub."""
    import transformers

    for version in VERSIONS:
        model = saved_model(version, case, tmp_path / version)
        out = exported(model, tmp_path / f"out {version}")
        texts = json.loads((SAVED_BY / version / TOKENIZER_OF.get(case, "plain") / IDS_FILE).read_text())
        environment = {**os.environ, "PYTHONPATH": os.environ["MINITRON_OTHER_TRANSFORMERS"], "HF_HUB_OFFLINE": "1"}
        call = [sys.executable, "-c", _OTHER, str(out), json.dumps(list(texts))]
        done = subprocess.run(call, env=environment, cwd=REPO, check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert found["version"] != transformers.__version__
        tokenizer = load_tokenizer(out)
        assert found["ids"] == texts == {text: tokenizer(text).input_ids for text in texts}
        with torch.no_grad():
            logits = load_transformers(out)(torch.arange(3, 83)[None]).logits.double().sum(-1)[0]
        assert found["logits"] == pytest.approx(logits.tolist(), abs=1e-4)
