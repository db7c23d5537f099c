"""Answers that are scored together have the same likelihoods as if scored separately."""

from __future__ import annotations

import pytest
import torch

from nemo_minitron.evaluation.choices import Block, attention_mask, fill_packs, group_by_question, pack, score_answers
from tests.support.tiny_models import FAMILY_CASES, tiny_model

# Two questions with several answers, of one and more tokens, mixed; one question that is a prefix of another.
PAIRS = [
    ([5, 6, 7], [8]),
    ([9, 10], [11, 12, 13]),
    ([5, 6, 7], [20, 21]),
    ([9, 10], [14]),
    ([5, 6], [7, 8]),
    ([5, 6, 7], [8, 9, 10, 11]),
]


@torch.no_grad()
def _alone(model: torch.nn.Module, question: list[int], answer: list[int]) -> tuple[float, bool]:
    logits = model(torch.tensor([question + answer])).logits[0, len(question) - 1 : -1]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    return float(chosen.sum()), logits.argmax(-1).tolist() == answer


@pytest.mark.parametrize("case", FAMILY_CASES)
@pytest.mark.parametrize("pack_tokens", [1, 12, 768])
def test_every_family_scores_answers_together_as_separately(case: str, pack_tokens: int) -> None:
    model = tiny_model(case)
    found = score_answers(model, PAIRS, pack_tokens=pack_tokens)
    for (likelihood, _), pair in zip(found, PAIRS, strict=True):
        assert likelihood == pytest.approx(_alone(model, *pair)[0], abs=2e-5)


def test_the_answer_that_the_model_would_give_is_marked_greedy() -> None:
    model = tiny_model("llama_gqa_tied")
    question = [5, 6, 7]
    with torch.no_grad():
        first = int(model(torch.tensor([question])).logits[0, -1].argmax())
        second = int(model(torch.tensor([[*question, first]])).logits[0, -1].argmax())
    answers = [[first, second], [first, (second + 1) % 512], [first]]
    assert [greedy for _, greedy in score_answers(model, [(question, answer) for answer in answers])] == [
        True,
        False,
        True,
    ]


def test_answers_to_one_question_form_one_block() -> None:
    blocks = group_by_question(PAIRS)
    assert [block.question for block in blocks] == [(5, 6, 7), (9, 10), (5, 6)]
    assert [block.places for block in blocks] == [(0, 2, 5), (1, 3), (4,)]
    assert [block.num_tokens for block in blocks] == [3 + 0 + 1 + 3, 2 + 2 + 0, 2 + 1]


def test_packs_are_filled_without_splitting_a_block() -> None:
    blocks = [Block((0,) * size, ((1,),), (size,)) for size in (2, 9, 4, 4, 6)]
    packs = fill_packs(blocks, 10)
    assert [[block.num_tokens for block in blocks] for blocks in packs] == [[9], [6, 4], [4, 2]]
    assert [[block.num_tokens for block in blocks] for blocks in fill_packs(blocks[1:2], 5)] == [[9]]


def test_an_answer_sees_its_question_and_itself() -> None:
    packed = pack([Block((5, 6), ((7, 8, 9), (10,), (11, 12)), (0, 1, 2)), Block((13,), ((14, 15),), (3,))])
    assert packed.tokens.tolist() == [5, 6, 7, 8, 11, 13, 14]
    assert packed.positions.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert packed.rows.tolist() == [1, 2, 3, 1, 1, 4, 5, 6]
    assert packed.labels.tolist() == [7, 8, 9, 10, 11, 12, 14, 15]
    seen = attention_mask(packed, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
