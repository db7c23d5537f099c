"""What model cards say of a loss."""

from __future__ import annotations

import pytest

from nemo_minitron.distillation.words import loss_in_words
from nemo_minitron.schema.losses import Loss


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({}, "forward KL to the live teacher's logits, no other loss"),
        ({"logits": None, "next_token": 1.0}, "next-token cross entropy, no other loss"),
        (
            {"logits": {"temperature": 2.0, "sparse": {"kind": "top_k", "k": 64}}, "next_token": "balanced"},
            "forward KL to the live teacher's logits at temperature 2, its 64 likeliest tokens, "
            "next-token cross entropy (balanced with it)",
        ),
        (
            {"hidden": {}},
            "forward KL to the live teacher's logits, "
            "cosine distance of hidden states (layers -3:-3 (teacher:student), embeddings)",
        ),
    ],
)
def test_a_loss_is_told_as_it_is(keys: dict, text: str) -> None:
    assert loss_in_words(Loss.model_validate(keys)) == text


def test_a_teacher_that_goes_on_learning_is_told() -> None:
    assert "the live and corrected teacher's logits" in loss_in_words(Loss(), corrected=True)


def test_a_cached_teacher_is_told() -> None:
    loss = Loss.model_validate({"logits": {"sparse": {"kind": "sampled", "rounds": 50}}})
    text = loss_in_words(loss, cached=True)
    assert text == "forward KL to the cached teacher's logits, 50 draws a token, no other loss"
