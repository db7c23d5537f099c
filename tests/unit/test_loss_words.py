"""Descriptions of losses in model cards."""

from __future__ import annotations

import ast
from typing import get_args

import pytest

from nemo_minitron.distillation.hidden import DISTANCES
from nemo_minitron.distillation.losses import LOSSES, LogitsDistance, forward_kl
from nemo_minitron.distillation.words import loss_in_words
from nemo_minitron.schema.losses import HiddenLoss, LogitsLoss, Loss
from tests.conftest import REPO


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
        (
            {"anchors": {"of": ["gate_up", "mlp_output"], "weight": 0.5, "decay_steps": 40}},
            "forward KL to the live teacher's logits, "
            "relative squared error inside the layers (gate up, mlp output; weight 0.5, falling to 0 by step 40)",
        ),
    ],
)
def test_a_description_has_each_part_of_the_loss(keys: dict, text: str) -> None:
    assert loss_in_words(Loss.model_validate(keys)) == text


def test_a_description_names_teacher_correction() -> None:
    assert "the live and corrected teacher's logits" in loss_in_words(Loss(), corrected=True)


def test_a_description_names_a_cached_teacher() -> None:
    loss = Loss.model_validate({"logits": {"sparse": {"kind": "sampled", "rounds": 50}}})
    text = loss_in_words(loss, cached=True)
    assert text == "forward KL to the cached teacher's logits, 50 draws a token, no other loss"


def test_each_loss_of_a_recipe_has_one_record() -> None:
    kinds = get_args(LogitsLoss.model_fields["kind"].annotation)
    assert set(LOSSES) == set(kinds)
    for kind in kinds:
        text = loss_in_words(Loss(logits=LogitsLoss(kind=kind)))
        assert "the live teacher's" in text
        assert "{" not in text
    for kind in get_args(HiddenLoss.model_fields["kind"].annotation):
        assert kind in DISTANCES
        assert f"{kind} distance" in loss_in_words(Loss(hidden=HiddenLoss(kind=kind)))


def test_losses_are_named_by_their_schema_and_their_records_only() -> None:
    """Other modules look a loss up in LOSSES or DISTANCES, so that a new one needs no edit of theirs."""
    # `mse` and `cosine` also name other things, such as a learning-rate schedule.
    names = set(LOSSES) - {"mse", "cosine"}
    known = {"schema/losses.py", "distillation/losses.py"}
    package = REPO / "nemo_minitron"
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    }
    assert found == known


@pytest.mark.parametrize("label", ["distance to {other}", "forward KL", "{teacher} {", "{teacher} {of:g}"])
def test_a_label_that_cannot_be_filled_in_is_an_error_when_it_is_defined(label: str) -> None:
    with pytest.raises((KeyError, ValueError)):
        LogitsDistance(forward_kl, label)
