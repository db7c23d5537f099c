"""FLOPs of training, compared with numbers computed by hand."""

from __future__ import annotations

import pytest

from nemo_minitron.api import load_recipe
from nemo_minitron.distillation.flops import forward_flops_per_token, training_flops_per_token
from nemo_minitron.families import ModelShape, num_params
from nemo_minitron.plan.shapes import model_shape
from tests.conftest import REPO


@pytest.fixture(scope="module")
def llama() -> ModelShape:
    recipe = load_recipe(REPO / "recipes/llama31_8b/width_4b.yaml", [])
    shape = model_shape(recipe, "teacher")
    assert shape is not None
    return shape


def test_llama_31_8b_by_hand(llama: ModelShape) -> None:
    """32 layers of q, o 4096 x 4096, k, v 4096 x 1024, three matrices 4096 x 14336; head 4096 x 128256."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    scores = 4096 * 8192  # q k and scores v: 2 x 4096 channels x half of 8192 tokens
    assert forward_flops_per_token(llama, 8192) == 2 * (32 * (layer + scores) + 4096 * 128256)


def test_training_is_about_six_times_the_parameters(llama: ModelShape) -> None:
    found = training_flops_per_token(llama, None, 2048)
    assert found == pytest.approx(6 * (num_params(llama) - 4096 * 128256), rel=0.05)


def test_a_teacher_adds_its_forward_pass(llama: ModelShape) -> None:
    alone, taught = (training_flops_per_token(llama, teacher, 4096) for teacher in (None, llama))
    assert taught / alone == pytest.approx(4 / 3)


def test_a_teacher_that_learns_counts_as_a_student(llama: ModelShape) -> None:
    alone = training_flops_per_token(llama, None, 4096)
    assert training_flops_per_token(llama, llama, 4096, teacher_learns=True) / alone == pytest.approx(2.0)
