"""Closed-form repair of linear layers whose inputs have been cut, by least squares. Pure functions of tensors.

A linear layer of the student has the sliced weight W [O, K] and gets the input s [K]; it should give y [O]. The repair
adds the X that minimizes

    E || (y - W s) - X s ||^2 + lambda ||X||^2,   so   X = C (H + lambda I)^-1,   C = E[(y - W s) s^T], H = E[s s^T].

This is ridge regression centered on the sliced weight: infinite damping gives plain slicing, and if nothing was cut,
y = W s and X = 0 exactly. For an input s that is the kept part of the teacher's own input a and y = W_T a, X equals
`W_cut A_cut,kept (A_kept,kept + lambda I)^-1`, the update of Optimal Brain Surgeon for removed inputs (OSSCAR,
2403.12983; ZipLM). The moments are uncentered, so that a constant part of the cut input is repaired, too.

Shapes: N tokens, K inputs of the student, M residuals, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_minitron.errors import NumericsError

COMPARED_ROWS = 256
"""Maximum number of outputs on which dampings are compared."""
_STRONGER = 10.0
"""Factor by which the damping grows while H + lambda I is not positive definite."""


@dataclass
class Moments:
    """Sums over tokens, fp64, from which the objective of a repair follows. They add up over batches and ranks."""

    inputs: Tensor
    """Sum of s s^T, [K, K]."""
    cross: Tensor
    """Sum of r s^T, [M, K], where the residual r is what the sliced layer lacks."""
    residuals: Tensor
    """Sum of r r^T, [M, M]; its diagonal [M] alone if no matrix will be applied to the residuals."""
    input_sum: Tensor
    """Sum of s, [K]."""
    residual_sum: Tensor
    """Sum of r, [M]."""
    num_tokens: Tensor
    """Number of tokens, [1]."""

    @classmethod
    def zeros(
        cls, num_residuals: int, num_inputs: int, device: torch.device, *, residual_products: bool = True
    ) -> Moments:
        """Return empty sums.

        Args:
            residual_products: keep all of r r^T, which `objective` needs to apply a matrix to the residuals.
        """

        def empty(*dims: int) -> Tensor:
            return torch.zeros(*dims, dtype=torch.float64, device=device)

        return cls(
            empty(num_inputs, num_inputs),
            empty(num_residuals, num_inputs),
            empty(num_residuals, num_residuals) if residual_products else empty(num_residuals),
            empty(num_inputs),
            empty(num_residuals),
            empty(1),
        )

    def add(self, residuals_NM: Tensor, inputs_NK: Tensor) -> None:
        """Add tokens; products are summed in at least fp32."""
        wide = torch.promote_types(inputs_NK.dtype, torch.float32)
        r, s = residuals_NM.to(wide), inputs_NK.to(wide)
        with summed_products(residuals_NM.dtype, inputs_NK.dtype):
            self.inputs += s.T @ s
            self.cross += r.T @ s
            self.residuals += r.T @ r if self.residuals.dim() == 2 else (r * r).sum(0)
        self.input_sum += s.sum(0)
        self.residual_sum += r.sum(0)
        self.num_tokens += len(s)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return all sums, for a reduction over ranks."""
        return (self.inputs, self.cross, self.residuals, self.input_sum, self.residual_sum, self.num_tokens)

    def require_finite(self, where: str) -> None:
        """Refuse sums that a NaN or an infinity has entered: otherwise every repair would silently be skipped.

        Raises:
            NumericsError: a sum is not finite.
        """
        require_finite_activations(self.tensors, where)

    def objective(self, left_OM: Tensor | None = None) -> Objective:
        """Return the objective of a weight.

        Args:
            left_OM: matrix that the residuals still have to pass, as when they are in front of a teacher's weight.
        """
        cross, sums = self.cross, self.residual_sum
        if left_OM is None:
            squares = self.residuals.trace() if self.residuals.dim() == 2 else self.residuals.sum()
        else:
            left = left_OM.to(self.cross)
            cross, sums = left @ cross, left @ sums
            squares = ((left @ self.residuals) * left).sum()
        return Objective(self.inputs, cross, squares, self.input_sum, sums, self.num_tokens)


def require_finite_activations(sums: Iterable[Tensor], where: str) -> None:
    """Refuse sums of products of activations that are not finite.

    Raises:
        NumericsError: a sum is not finite.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in sums):
        raise NumericsError(
            "The model's activations are not finite.",
            where=where,
            next_step="Try another precision (bf16, fp32), and evaluate the unrepaired model first.",
        )


@contextmanager
def summed_products(*dtypes: torch.dtype) -> Iterator[None]:
    """Let matrix products of fp32 tensors round their factors to bf16, if these hold bf16 numbers: then none changes.

    Sums stay in fp32. On a CPU with bf16 instructions this takes less than half of the time.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if set(dtypes) == {torch.bfloat16} else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Objective:
    """The least-squares objective of one weight, as sums over tokens, fp64."""

    inputs: Tensor
    """Sum of s s^T, [K, K]."""
    cross: Tensor
    """Sum of (y - W s) s^T, [O, K]."""
    squares: Tensor
    """Sum of ||y - W s||^2, a scalar."""
    input_sum: Tensor
    """Sum of s, [K]."""
    residual_sum: Tensor
    """Sum of y - W s, [O]."""
    num_tokens: Tensor
    """Number of tokens, [1]."""

    def of_weight_below(self, difference_OK: Tensor) -> Objective:
        """Return the objective of the weight W - D: y - (W - D) s = (y - W s) + D s.

        Args:
            difference_OK: D. If it is zero, no bit changes.
        """
        if not bool(difference_OK.any()):
            return self
        d = difference_OK.to(self.cross)
        made = d @ self.inputs
        squares = self.squares + 2 * (d * self.cross).sum() + (made * d).sum()
        sums = self.residual_sum + d @ self.input_sum
        return replace(self, cross=self.cross + made, squares=squares, residual_sum=sums)

    def of_target_above(self, constant_O: Tensor) -> Objective:
        """Return the objective for the target y + c, as with another bias.

        Args:
            constant_O: c. If it is zero, no bit changes.
        """
        if not bool(constant_O.any()):
            return self
        c = constant_O.to(self.cross)
        squares = self.squares + 2 * (c @ self.residual_sum) + self.num_tokens[0] * (c @ c)
        sums = self.residual_sum + self.num_tokens * c
        return replace(self, cross=self.cross + torch.outer(c, self.input_sum), squares=squares, residual_sum=sums)

    def rows(self, rows: Tensor) -> Objective:
        """Return the objective of some outputs; `squares` stays that of all, which only shifts errors."""
        return replace(self, cross=self.cross[rows], residual_sum=self.residual_sum[rows])


@dataclass(frozen=True)
class Repair:
    """The chosen correction of one weight, and its error on held-out text."""

    update: Tensor | None
    """Correction X that is added to the sliced weight, fp64 [O, K]; None: the sliced weight stays."""
    damping: float
    """Damping, as a share of the mean diagonal; infinite if the sliced weight stays."""
    sliced_error: float
    """Held-out E||y - W s||^2 of the sliced weight."""
    error: float
    """The same with the correction; never above `sliced_error`."""

    @property
    def recovered(self) -> float:
        """Share of the held-out error of plain slicing that the repair removes."""
        return 1.0 - self.error / self.sliced_error if self.sliced_error > 0 else 0.0


def least_squares(objective: Objective, damping: float) -> tuple[Tensor, float]:
    """Return (X [O, K] in fp64, the damping that was used).

    Args:
        damping: lambda as a share of the mean of H's diagonal. It grows tenfold while H + lambda I is singular to
            working precision; infinite damping gives X = 0.
    """
    h, c = objective.inputs, objective.cross
    scale = float(h.diagonal().mean())
    if math.isinf(damping) or scale == 0.0 or not bool(c.any()):
        return torch.zeros_like(c), damping
    while True:
        damped = h.clone()
        damped.diagonal().add_(damping * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.cholesky_solve(c.T, factor).T, damping
        damping = max(damping, torch.finfo(h.dtype).eps) * _STRONGER


def error_of(objective: Objective, update_OK: Tensor | None) -> float:
    """Return E||y - W s - X s||^2 per token on the text of the objective; None means X = 0."""
    total = objective.squares
    if update_OK is not None:
        total = total - 2 * (update_OK * objective.cross).sum()
        total = total + ((update_OK @ objective.inputs) * update_OK).sum()
    return float(total / objective.num_tokens.clamp_min(1))


def best_repair(calibration: Objective, heldout: Objective, dampings: Sequence[float]) -> Repair:
    """Choose the damping with the smallest error on held-out text; the sliced weight stays if none is better.

    `dampings` are values of lambda, as shares of the mean of H's diagonal (OSSCAR and ZipLM use 1e-2, GRAIL 1e-3).

    Dampings are compared on at most `COMPARED_ROWS` outputs, evenly spaced, because solving for all takes most of the
    time of a repair; the chosen one must then be better than slicing on all outputs.
    """
    sliced = error_of(heldout, None)
    rows = torch.arange(0, len(calibration.cross), math.ceil(len(calibration.cross) / COMPARED_ROWS))
    some, judged = calibration.rows(rows), heldout.rows(rows)
    errors = {damping: error_of(judged, least_squares(some, damping)[0]) for damping in dampings}
    update, used = least_squares(calibration, min(errors, key=lambda damping: errors[damping]))
    error = error_of(heldout, update)
    return Repair(update, used, sliced, error) if error < sliced else Repair(None, math.inf, sliced, sliced)
