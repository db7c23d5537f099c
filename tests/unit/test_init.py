"""Models with random weights: sizes, spread of the weights, tokenizer, and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer

from nemo_minitron.api import load_plan
from nemo_minitron.errors import CheckpointError, ConfigError, DataError, MinitronError, PlanError
from nemo_minitron.families import num_params, parameters, read_shape
from nemo_minitron.hf.checkpoint import Checkpoint, read_config
from nemo_minitron.plan.shapes import model_shape
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.artifacts import Model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.init.params import InitStage
from nemo_minitron.stages.init.run import END_OF_TEXT, Inputs, init
from nemo_minitron.system.progress import Progress
from tests.conftest import REPO
from tests.support.tiny_models import FAMILY_CASES, load_transformers, tiny_model_dir

VOCABULARY = 320
WORDS = ["the", "river", "runs", "down", "to", "sea", "and", "rain", "falls", "on", "hills", "fox", "sleeps"]
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    choices = torch.randint(len(WORDS), (20, 100), generator=generator).tolist()
    file = tmp_path / "text.txt"
    file.write_text("\f".join(" ".join(WORDS[i] for i in row) for row in choices))
    return file


def _init(folder: Path, like: Path | None = None, **params: Any) -> tuple[Path, dict[str, Any]]:
    folder.mkdir(parents=True)
    context = StageContext("fresh", "test", folder, folder, Execution(), Progress(silent=True))
    inputs = Inputs(None if like is None else Model("like", "prune", like, "", {"license": "mit"}))
    stage = InitStage.model_validate({"kind": "init", "inputs": {"like": "like"} if like is not None else {}, **params})
    return folder, dict(init(stage, inputs, context))


def _tokenizer(text: Path, vocab_size: int = VOCABULARY, **keys: Any) -> dict[str, Any]:
    source = {"source": str(text), "document_separator": "\f", **keys}
    return {"vocab_size": vocab_size, "sources": [source]}


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_transformers_loads_every_family_and_its_loss_is_that_of_guessing(case: str, tmp_path: Path) -> None:
    folder, result = _init(tmp_path / "out", tiny_model_dir(tmp_path / "like", case))
    model = load_transformers(folder)
    assert result["num_params"] == sum(parameter.numel() for parameter in model.parameters())
    tokens_BS = torch.randint(512, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = model(tokens_BS, labels=tokens_BS).loss.item()
    assert loss == pytest.approx(math.log(512), abs=0.05)


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_every_tensor_has_the_requested_mean_and_spread(case: str, tmp_path: Path) -> None:
    folder, _ = _init(tmp_path / "out", tiny_model_dir(tmp_path / "like", case), init_std=0.05)
    checkpoint = Checkpoint.open(folder)
    norm = 0.0 if checkpoint.shape.norm == "layernorm1p" else 1.0
    for parameter in parameters(checkpoint.shape):
        tensor = checkpoint.read(parameter.hf)
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.full_like(tensor, norm if parameter.hf.endswith("weight") else 0.0))
            continue
        residual = parameter.hf.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.05 / (2 * checkpoint.shape.num_layers) ** 0.5 if residual else 0.05
        sampling = std / tensor.numel() ** 0.5
        assert tensor.mean().item() == pytest.approx(0.0, abs=5 * sampling), parameter.hf
        assert tensor.std().item() == pytest.approx(std, abs=5 * sampling), parameter.hf


def test_a_model_like_another_has_its_config_and_tokenizer_but_none_of_its_weights(tmp_path: Path) -> None:
    like = tiny_model_dir(tmp_path / "like", "qwen3")
    folder, result = _init(tmp_path / "out", like)
    assert read_shape(read_config(folder)) == read_shape(read_config(like))
    assert (folder / "tokenizer.json").read_bytes() == (like / "tokenizer.json").read_bytes()
    assert result["license"] == "mit"
    old, new = Checkpoint.open(like), Checkpoint.open(folder)
    assert not any(torch.equal(old.read(name), new.read(name)) for name in new.tensors)


def test_a_seed_gives_the_same_bytes_and_another_seed_another_model(text: Path, tmp_path: Path) -> None:
    files = [
        _init(tmp_path / name, architecture=LLAMA, tokenizer=_tokenizer(text), seed=seed)[0]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    weights = [(folder / "model.safetensors").read_bytes() for folder in files]
    assert weights[0] == weights[1] != weights[2]
    tokenizers = [(folder / "tokenizer.json").read_bytes() for folder in files]
    assert tokenizers[0] == tokenizers[1] == tokenizers[2]


def test_the_new_tokenizer_spells_any_text_and_ends_documents(text: Path, tmp_path: Path) -> None:
    folder, result = _init(tmp_path / "out", architecture=LLAMA, tokenizer=_tokenizer(text))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for sample in ("the river runs", "Ünïcode — 漢字 🦊\n\ttabs", "  two  spaces "):
        assert tokenizer.decode(tokenizer(sample)["input_ids"], clean_up_tokenization_spaces=False) == sample
    assert len(tokenizer("the river runs down to the sea")["input_ids"]) < 12
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
    config = read_config(folder)
    assert tokenizer.eos_token_id == config["eos_token_id"] == config["bos_token_id"] == 0
    assert len(tokenizer) <= config["vocab_size"] == result["shape"]["vocab_size"] == VOCABULARY


def test_ids_of_special_tokens_are_those_of_the_new_tokenizer(text: Path, tmp_path: Path) -> None:
    pasted = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 32000}
    folder, _ = _init(tmp_path / "out", architecture={**LLAMA, **pasted}, tokenizer=_tokenizer(text))
    config = read_config(folder)
    assert {key: config[key] for key in pasted} == dict.fromkeys(pasted, 0)


def test_vocabularies_of_different_sizes_are_refused_before_a_run(text: Path, tmp_path: Path) -> None:
    recipe = REPO / "recipes/claims/teacher.yaml"
    overrides = [f"execution.run_root={tmp_path}", f"stages.teacher_init.tokenizer.sources.0.source={text}"]
    with pytest.raises(
        PlanError, match=r"teacher_init: The architecture has a vocabulary of 2048, .* 2047\. Next: Set"
    ):
        load_plan(recipe, [*overrides, "stages.teacher_init.tokenizer.vocab_size=2047"])


def test_at_most_max_documents_are_used(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\f".join(["abab " * 50, "abab " * 50, "xyxy " * 50]))
    folder, _ = _init(tmp_path / "two", architecture=LLAMA, tokenizer=_tokenizer(file, max_documents=2))
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert "ab" in vocabulary
    assert "xy" not in vocabulary


def test_dtype_is_that_of_every_tensor(text: Path, tmp_path: Path) -> None:
    folder, result = _init(tmp_path / "out", architecture=LLAMA, tokenizer=_tokenizer(text), dtype="bfloat16")
    assert Checkpoint.open(folder).dtypes == {"bfloat16"}
    assert result["dtype"] == read_config(folder)["dtype"] == "bfloat16"


def test_the_plan_counts_the_parameters_before_anything_is_written(text: Path, tmp_path: Path) -> None:
    recipe = REPO / "recipes/claims/teacher.yaml"
    overrides = [f"execution.run_root={tmp_path}", f"stages.teacher_init.tokenizer.sources.0.source={text}"]
    plan = load_plan(recipe, overrides, checked=False)
    shape = model_shape(plan.recipe, "teacher_init")
    assert shape is not None
    layer = 4 * 160 * 160 + 3 * 160 * 448 + 2 * 160
    assert num_params(shape) == 2048 * 160 + 8 * layer + 160


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"vocab_size": 512}, ConfigError, "512.*320"),
        ({"architectures": ["GPT2LMHeadModel"]}, CheckpointError, "GPT2LMHeadModel is not supported"),
        ({"hidden_size": None}, CheckpointError, "hidden_size"),
        ({"num_key_value_heads": 3}, CheckpointError, "not a multiple"),
    ],
)
def test_an_impossible_architecture_is_named(
    change: dict[str, Any], error: type[MinitronError], words: str, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        _init(tmp_path / "out", architecture={**LLAMA, **change}, tokenizer=_tokenizer(text))


def test_an_unused_separator_is_named_with_its_key(tmp_path: Path) -> None:
    rows = tmp_path / "text.jsonl"
    rows.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"where: stages\.fresh\.tokenizer\.sources\.0"):
        _init(tmp_path / "out", architecture=LLAMA, tokenizer=_tokenizer(rows))


def test_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt"):
        _init(tmp_path / "out", architecture=LLAMA, tokenizer=_tokenizer(tmp_path / "nothing.txt"))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"architecture": LLAMA},
        {"tokenizer": _tokenizer(Path("x.txt"))},
        {"architecture": LLAMA, "tokenizer": _tokenizer(Path("x.txt")), "inputs": {"like": "teacher"}},
        {"architecture": LLAMA, "inputs": {"like": "teacher"}},
    ],
)
def test_a_model_has_one_origin(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"give architecture and tokenizer, or inputs\.like"):
        InitStage.model_validate({"kind": "init", **keys})


def test_a_vocabulary_is_large_enough_for_the_bytes() -> None:
    with pytest.raises(ValidationError, match="257"):
        InitStage.model_validate({"kind": "init", "architecture": LLAMA, "tokenizer": _tokenizer(Path("x"), 256)})
