"""L-BFGS for many small problems side by side, each row its own, with an amount of work that is known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_ARMIJO = 1e-4  # of the decrease that the slope promises. Source: Nocedal and Wright, Numerical Optimization, 3.1
_CURVATURE = 1e-10  # least cosine of a step and its change of slope that is learnt from


def minimise(
    evaluate: Callable[[torch.Tensor, bool], tuple[Any, Any]], x: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least values found, float64[n], and where, float64[n, d], each row minimised on its own.

    Every iteration evaluates exactly one trial point: a row whose value does not fall stays where it is, learns the
    curvature that it met, and halves its next step. So the work is `iterations` gradients and one value more, whatever
    the function; a line search, as scipy's L-BFGS-B has it, needs a number of evaluations that nobody knows before.
    The first step has length 1, as there.

    Args:
        evaluate: `evaluate(x, gradient)` is the values, float64[n], and, if `gradient`, the slopes, float64[n, d].
        x: where to start, float64[n, d].
        iterations: steps.
    """
    import torch

    value, slope = evaluate(x, iterations > 0)
    memory: list[tuple] = []
    step = torch.ones_like(value)
    scale = 1 / slope.norm(dim=1).clamp_min(torch.finfo(slope.dtype).tiny) if iterations else step
    known = torch.zeros_like(value, dtype=torch.bool)  # rows that have met positive curvature
    for turn in range(iterations):
        last = turn == iterations - 1
        direction = _direction(slope, memory, scale)
        trial = x + step[:, None] * direction
        there, slope_there = evaluate(trial, not last)
        better = there < value + _ARMIJO * step * (slope * direction).sum(1)  # False for NaN
        if not last:
            s, y = trial - x, slope_there - slope
            product, length = (s * y).sum(1), y.norm(dim=1)
            learnt = product > _CURVATURE * s.norm(dim=1) * length  # False for NaN
            y = torch.where(learnt[:, None], y, 1.0)
            memory.append((s, y, torch.where(learnt, 1 / product, 0.0)))
            known |= learnt
            steepest = 1 / slope_there.norm(dim=1).clamp_min(torch.finfo(slope.dtype).tiny)
            scale = torch.where(learnt, product / length.square(), torch.where(known | ~better, scale, steepest))
            slope = torch.where(better[:, None], slope_there, slope)
        x = torch.where(better[:, None], trial, x)
        value = torch.where(better, there, value)
        step = torch.where(better, 1.0, step / 2)
    return value, x


def _direction(slope: torch.Tensor, memory: list[tuple], scale: torch.Tensor) -> torch.Tensor:
    """Minus the approximate inverse Hessian times the slope: the two-loop recursion, each row with its own pairs.

    A pair that a row has not learnt from has weight 0 and drops out. Source: Nocedal and Wright, algorithm 7.4.
    """
    q, kept = slope, []
    for s, y, weight in reversed(memory):
        a = weight * (s * q).sum(1)
        q = q - a[:, None] * y
        kept.append(a)
    r = scale[:, None] * q
    for (s, y, weight), a in zip(memory, reversed(kept), strict=True):
        r = r + (a - weight * (y * r).sum(1))[:, None] * s
    return -r
