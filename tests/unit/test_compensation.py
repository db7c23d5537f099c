"""Closed-form repair of a linear layer whose inputs were cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nemo_minitron.errors import NumericsError
from nemo_minitron.pruning.compensation import Moments, Objective, best_repair, error_of, least_squares
from nemo_minitron.schema.pruning import Compensation

CPU = torch.device("cpu")
DAMPINGS = Compensation().dampings
KEPT = torch.tensor([0, 2, 3, 5, 7])


def _inputs(num_tokens: int = 400, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(num_tokens, size, generator=generator, dtype=torch.float64) @ mixed + 0.5


def _weight(rows: int = 6, size: int = 8) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def _moments(inputs: Tensor, weight: Tensor, kept: Tensor) -> Moments:
    given = inputs[:, kept]
    moments = Moments.zeros(len(weight), len(kept), CPU)
    for rows in torch.arange(len(inputs)).split(64):
        moments.add(inputs[rows] @ weight.T - given[rows] @ weight[:, kept].T, given[rows])
    return moments


def _objective(inputs: Tensor, weight: Tensor, kept: Tensor) -> Objective:
    return _moments(inputs, weight, kept).objective()


def test_moments_of_bf16_activations_lose_nothing() -> None:
    inputs, residuals = _inputs().bfloat16(), _inputs()[:, :6].bfloat16()
    moments = Moments.zeros(6, inputs.shape[1], CPU)
    moments.add(residuals, inputs)
    wide, lacking = inputs.double(), residuals.double()
    expected = (wide.T @ wide, lacking.T @ wide, lacking.T @ lacking)
    for found, exact in zip((moments.inputs, moments.cross, moments.residuals), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_squares_of_residuals_need_the_diagonal_only() -> None:
    inputs, residuals = _inputs(), _inputs()[:, :6]
    whole = Moments.zeros(6, inputs.shape[1], CPU)
    diagonal = Moments.zeros(6, inputs.shape[1], CPU, residual_products=False)
    for moments in (whole, diagonal):
        moments.add(residuals, inputs)
    torch.testing.assert_close(diagonal.objective().squares, whole.objective().squares)


def test_the_repaired_weight_is_the_least_squares_solution_on_the_raw_activations() -> None:
    inputs, weight = _inputs(), _weight()
    update, _ = least_squares(_objective(inputs, weight, KEPT), 1e-14)
    expected = torch.linalg.lstsq(inputs[:, KEPT], inputs @ weight.T).solution.T
    torch.testing.assert_close(weight[:, KEPT] + update, expected, rtol=1e-8, atol=1e-8)


def test_it_is_the_update_of_optimal_brain_surgeon_for_removed_inputs() -> None:
    """The reference is W_cut A_cut,kept (A_kept,kept + lambda I)^-1, as in OSSCAR."""
    inputs, weight, damping = _inputs(), _weight(), 1e-2
    cut = torch.tensor([1, 4, 6])
    gram = inputs.T @ inputs
    kept_gram = gram[KEPT][:, KEPT]
    damped = kept_gram + damping * kept_gram.diagonal().mean() * torch.eye(len(KEPT), dtype=torch.float64)
    expected = weight[:, cut] @ gram[cut][:, KEPT] @ torch.linalg.inv(damped)
    update, _ = least_squares(_objective(inputs, weight, KEPT), damping)
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-9)


def test_keeping_everything_changes_no_bit() -> None:
    inputs, weight = _inputs(), _weight()
    moments = _objective(inputs, weight, torch.arange(8))
    update, _ = least_squares(moments, 1e-3)
    assert torch.equal(weight + update, weight)
    assert best_repair(moments, moments, DAMPINGS).update is None


def test_infinite_damping_is_plain_slicing() -> None:
    update, _ = least_squares(_objective(_inputs(), _weight(), KEPT), math.inf)
    assert not update.any()


def test_a_duplicated_input_is_restored_exactly() -> None:
    inputs, weight = _inputs(), _weight()
    inputs[:, 6] = inputs[:, 5]
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 7])
    moments = _objective(inputs, weight, kept)
    update, _ = least_squares(moments, 1e-13)
    merged = weight[:, kept].clone()
    merged[:, 5] += weight[:, 6]
    torch.testing.assert_close(weight[:, kept] + update, merged, rtol=1e-6, atol=1e-6)
    assert error_of(moments, update) < 1e-9 * error_of(moments, None)


def test_inputs_that_are_zero_or_dependent_need_no_special_care() -> None:
    inputs, weight = _inputs(), _weight()
    inputs[:, 0] = 0.0
    inputs[:, 3] = inputs[:, 2]
    update, damping = least_squares(_objective(inputs, weight, KEPT), 1e-30)
    assert torch.isfinite(update).all()
    assert damping > 1e-30, "a singular matrix makes the damping grow"
    silent = Moments.zeros(6, 5, CPU).objective()
    assert not least_squares(silent, 1e-3)[0].any()


@pytest.mark.parametrize("update", [None, "some"])
def test_the_error_is_that_of_the_raw_activations(update: str | None) -> None:
    inputs, weight = _inputs(), _weight()
    moments = _objective(inputs, weight, KEPT)
    correction = None if update is None else least_squares(moments, 1e-1)[0]
    used = weight[:, KEPT] if correction is None else weight[:, KEPT] + correction
    expected = (inputs @ weight.T - inputs[:, KEPT] @ used.T).square().sum(1).mean()
    assert error_of(moments, correction) == pytest.approx(float(expected), rel=1e-9)


def test_the_damping_is_chosen_on_held_out_text() -> None:
    weight = _weight()
    few, other = _inputs(6), _inputs(400, seed=1)
    calibration, heldout = _objective(few, weight, KEPT), _objective(other, weight, KEPT)
    found = best_repair(calibration, heldout, (1e-8, 1e-2, 1.0, 10.0))
    errors = {d: error_of(heldout, least_squares(calibration, d)[0]) for d in (1e-8, 1e-2, 1.0, 10.0)}
    assert found.error == min(*errors.values(), found.sliced_error)


def test_a_repair_that_makes_held_out_text_worse_is_not_used() -> None:
    weight = _weight()
    calibration = _objective(_inputs(6), weight, KEPT)
    opposite = _objective(_inputs(400), weight, KEPT)
    opposite.cross.neg_()
    found = best_repair(calibration, opposite, DAMPINGS)
    assert found.update is None
    assert found.error == found.sliced_error
    assert found.recovered == 0.0


def test_a_weight_that_differs_from_the_sliced_one_has_its_own_objective() -> None:
    inputs, weight = _inputs(), _weight()
    sliced, given = _objective(inputs, weight, KEPT), inputs[:, KEPT]
    trained = weight[:, KEPT] - 0.1 * _weight(6, 5)
    found = sliced.of_weight_below(weight[:, KEPT] - trained)
    lacking = inputs @ weight.T - given @ trained.T
    torch.testing.assert_close(found.cross, lacking.T @ given)
    torch.testing.assert_close(found.squares, lacking.square().sum())
    assert sliced.of_weight_below(torch.zeros_like(trained)) is sliced


def test_another_bias_than_the_teachers_is_part_of_the_objective() -> None:
    """Also below another weight: both came with a training after the cut."""
    inputs, weight, missing = _inputs(), _weight(), _weight()[:, 0]
    sliced, given = _objective(inputs, weight, KEPT), inputs[:, KEPT]
    trained = weight[:, KEPT] - 0.1 * _weight(6, 5)
    found = sliced.of_weight_below(weight[:, KEPT] - trained).of_target_above(missing)
    lacking = inputs @ weight.T + missing - given @ trained.T
    torch.testing.assert_close(found.cross, lacking.T @ given)
    torch.testing.assert_close(found.squares, lacking.square().sum())
    torch.testing.assert_close(found.residual_sum, lacking.sum(0))
    assert sliced.of_target_above(torch.zeros_like(missing)) is sliced


def test_activations_that_are_not_finite_are_refused() -> None:
    moments = _moments(_inputs(), _weight(), KEPT)
    moments.require_finite("mlp_output of layer 0")
    moments.cross[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="activations are not finite") as caught:
        moments.require_finite("mlp_output of layer 0")
    assert "mlp_output of layer 0" in str(caught.value)


def test_residuals_in_front_of_a_weight_are_mapped_through_it() -> None:
    """Readers of one norm share their moments: W C and W R W^T are those of the residuals W r."""
    inputs, weight = _inputs(), _weight()
    given = inputs[:, KEPT]
    lacks = inputs.clone()
    lacks[:, KEPT] = 0.0
    in_front, direct = Moments.zeros(8, len(KEPT), CPU), Moments.zeros(6, len(KEPT), CPU)
    in_front.add(lacks, given)
    direct.add(lacks @ weight.T, given)
    found, expected = in_front.objective(weight), direct.objective()
    for name in ("inputs", "cross", "squares", "input_sum", "residual_sum", "num_tokens"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
