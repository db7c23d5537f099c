"""Sample texts are the model's most likely continuations, whatever the folder's generation config says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.errors import CheckpointError
from nemo_minitron.evaluation.answers import greedy_answers
from nemo_minitron.evaluation.generation import greedy_texts, load_for_inference
from nemo_minitron.evaluation.stop_text import split_at_stop
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.system.progress import Progress
from tests.conftest import Cli
from tests.support.tiny_models import tiny_model_dir

UNWANTED = {
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 400,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 12,
    "max_length": 3,
    "suppress_tokens": list(range(100, 300)),
    "begin_suppress_tokens": list(range(300, 400)),
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 6,
    "bad_words_ids": [[token] for token in range(1, 100)],
    "sequence_bias": [[[7], 100.0]],
    "num_beams": 3,
    "pad_token_id": 100_000,
}
"""What a folder may ask of `generate`; transformers reads it from both of its JSON files."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen2")
    (folder / "generation_config.json").write_text(json.dumps({**UNWANTED, "eos_token_id": 0}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **UNWANTED, "pad_token_id": 100_000}))
    return folder


@torch.no_grad()
def _by_hand(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    out = list(ids)
    for _ in range(count):
        following = int(model(torch.tensor([out])).logits[0, -1].argmax())
        if following == 0:
            break
        out.append(following)
    return out[len(ids) :]


def test_texts_are_greedy_and_the_same_each_time(model_dir: Path) -> None:
    model, tokenizer = load_for_inference(model_dir, "fp32", "cpu"), load_tokenizer(model_dir)
    prompts = ["The quick brown", "Numbers have proof. 0123"]
    texts = greedy_texts(model, tokenizer, prompts, 12)
    assert [sample["prompt"] for sample in texts] == prompts
    for sample in texts:
        expected = _by_hand(model, tokenizer(sample["prompt"]).input_ids, 12)
        assert sample["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert texts == greedy_texts(model, tokenizer, prompts, 12)


def test_the_models_own_generation_config_changes_no_answer(model_dir: Path) -> None:
    """Even one that the model has been given after loading; it has it again afterwards."""
    from transformers import GenerationConfig

    model, tokenizer = load_for_inference(model_dir, "fp32", "cpu"), load_tokenizer(model_dir)
    own = GenerationConfig(**{**UNWANTED, "top_p": 0.3, "eos_token_id": 0})
    model.generation_config = own
    prompt = "The quick brown"
    ids = tokenizer(prompt).input_ids
    expected = tokenizer.decode(_by_hand(model, ids, 12), skip_special_tokens=True)
    assert greedy_texts(model, tokenizer, [prompt], 12)[0]["text"] == expected
    assert greedy_answers(model, tokenizer, [ids], 12, Progress(silent=True))[0][0] == expected
    assert model.generation_config is own


def test_generate_by_others_is_greedy_too(model_dir: Path) -> None:
    """As lm-eval calls it."""
    model, tokenizer = load_for_inference(model_dir, "fp32", "cpu"), load_tokenizer(model_dir)
    ids = tokenizer("The quick brown").input_ids
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=0)[0, len(ids) :]
    expected = _by_hand(model, ids, 12)
    assert [token for token in made.tolist() if token != 0] == expected


def test_a_chat_without_temperature_picks_the_most_likely_tokens(
    model_dir: Path, tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = load_for_inference(model_dir, "fp32", "cpu"), load_tokenizer(model_dir)
    message = [{"role": "user", "content": "What is 7?"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    code, said = minitron("chat", model_dir, "--once", "What is 7?", "--max-new-tokens", 12)
    assert code == 0
    assert said.strip() == tokenizer.decode(_by_hand(model, ids, 12), skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 6]}, "config.json": {"eos_token_id": 7}}, [5, 6]),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 7}}, 7),
        ({"generation_config.json": {"eos_token_id": None}, "config.json": {"eos_token_id": 7}}, None),
        ({"config.json": {"eos_token_id": [7]}}, [7]),
        ({"config.json": {"eos_token_id": []}}, None),
    ],
)
def test_the_folder_decides_where_a_text_ends(
    files: dict[str, dict[str, Any]], expected: Any, model_dir: Path, tmp_path: Path
) -> None:
    folder = _with_files(model_dir, tmp_path, {name: json.dumps(content) for name, content in files.items()})
    assert load_for_inference(folder, "fp32", "cpu").generation_config.eos_token_id == expected


@pytest.mark.parametrize("text", ['{"eos_token_id": ', "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}'])
def test_a_damaged_generation_config_is_named(text: str, model_dir: Path, tmp_path: Path) -> None:
    folder = _with_files(model_dir, tmp_path, {"generation_config.json": text})
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_for_inference(folder, "fp32", "cpu")


def _with_files(model_dir: Path, folder: Path, files: dict[str, str]) -> Path:
    """The model with the keys or contents of some files changed."""
    shutil.copytree(model_dir, folder, dirs_exist_ok=True)
    (folder / "generation_config.json").unlink()
    for name, text in files.items():
        before = json.loads((folder / name).read_text()) if name == "config.json" else None
        (folder / name).write_text(text if before is None else json.dumps({**before, **json.loads(text)}))
    return folder


def test_models_without_any_end_token_answer_to_the_limit(model_dir: Path, tmp_path: Path) -> None:
    folder = _with_files(model_dir, tmp_path, {"config.json": json.dumps({"eos_token_id": None})})
    model, tokenizer = load_for_inference(folder, "fp32", "cpu"), load_tokenizer(folder)
    tokenizer.eos_token = tokenizer.pad_token = None
    assert [size for _, size in greedy_answers(model, tokenizer, [[7], [8, 9]], 4, Progress(silent=True))] == [4, 4]


def test_answers_of_a_batch_equal_those_of_single_prompts(model_dir: Path) -> None:
    model, tokenizer = load_for_inference(model_dir, "fp32", "cpu"), load_tokenizer(model_dir)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 400, (3 + 7 * number % 31,), generator=generator).tolist() for number in range(20)]
    found = greedy_answers(model, tokenizer, prompts, 12, Progress(silent=True))
    stops = {0, tokenizer.eos_token_id}
    for prompt, (text, tokens) in zip(prompts, found, strict=True):
        expected = _by_hand(model, prompt, 12)
        end = next((place for place, token in enumerate(expected) if token in stops), len(expected))
        assert (text, tokens) == (tokenizer.decode(expected[:end], skip_special_tokens=True), end)


def test_a_turn_ends_at_a_text_too(model_dir: Path) -> None:
    model, tokenizer = load_for_inference(model_dir, "fp32", "cpu"), load_tokenizer(model_dir)
    prompts = [[7, 8, 9], [11, 300, 20, 21, 22]]
    for prompt in prompts:
        tokens = _by_hand(model, prompt, 12)
        whole = tokenizer.decode(tokens)
        stop = tokenizer.decode(tokens[4:7])  # several tokens of it
        text, size = greedy_answers(model, tokenizer, [prompt], 12, Progress(silent=True), stop)[0]
        assert text == whole[: whole.index(stop)]
        assert tokenizer.decode(tokens[:size]) == text


@pytest.mark.parametrize("pieces", [["4.<", "|im_", "end|>", ">>"], ["4.<|im_end|>>>"], ["4", ".<|im_end|", ">"]])
def test_what_is_streamed_ends_before_the_stop(pieces: list[str]) -> None:
    shown, waiting = "", ""
    for number, piece in enumerate(pieces):
        more, waiting = split_at_stop("<|im_end|>", waiting + piece, last=number == len(pieces) - 1)
        shown += more
    assert shown == "4."


def test_what_only_looks_like_a_stop_is_streamed() -> None:
    assert split_at_stop("<|im_end|>", "a <|im", last=False) == ("a ", "<|im")
    assert split_at_stop("<|im_end|>", "<|im here", last=False) == ("<|im here", "")
    assert split_at_stop("<|im_end|>", "1 <", last=True) == ("1 <", "")
    assert split_at_stop(None, "1 <", last=False) == ("1 <", "")


def test_an_empty_prompt_starts_from_nothing(model_dir: Path) -> None:
    model, tokenizer = load_for_inference(model_dir, "fp32", "cpu"), load_tokenizer(model_dir)
    assert greedy_texts(model, tokenizer, [""], 3)[0]["prompt"] == ""


def test_precision_decides_the_dtype(model_dir: Path) -> None:
    assert load_for_inference(model_dir, "bf16", "cpu").dtype == torch.bfloat16
