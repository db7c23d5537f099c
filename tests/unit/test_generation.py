"""Sample texts are the model's most likely continuations, whatever the folder's generation config says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_minitron.cli_chat import until
from nemo_minitron.evaluation.answers import greedy_answers
from nemo_minitron.evaluation.generation import greedy_texts, load_for_inference
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.progress import Progress
from tests.support.tiny_models import tiny_model_dir


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen2")
    sampling = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "eos_token_id": 0, "top_k": 400}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
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


def test_answers_of_a_batch_are_those_of_each_prompt_alone(model_dir: Path) -> None:
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
        more, waiting = until("<|im_end|>", waiting + piece, last=number == len(pieces) - 1)
        shown += more
    assert shown == "4."


def test_what_only_looks_like_a_stop_is_streamed() -> None:
    assert until("<|im_end|>", "a <|im", last=False) == ("a ", "<|im")
    assert until("<|im_end|>", "<|im here", last=False) == ("<|im here", "")
    assert until("<|im_end|>", "1 <", last=True) == ("1 <", "")
    assert until(None, "1 <", last=False) == ("1 <", "")


def test_an_empty_prompt_starts_from_nothing(model_dir: Path) -> None:
    model, tokenizer = load_for_inference(model_dir, "fp32", "cpu"), load_tokenizer(model_dir)
    assert greedy_texts(model, tokenizer, [""], 3)[0]["prompt"] == ""


def test_precision_decides_the_dtype(model_dir: Path) -> None:
    assert load_for_inference(model_dir, "bf16", "cpu").dtype == torch.bfloat16
