"""Closed forms in the Gram matrix of (z0, eps, e(z_t,t,null), e(z_t,t,c)): any guidance weight, any DDIM step.

Source: `attacks.md` 1.1, for settings that noise z0 anew at every step: z_t = alpha z0 + sigma eps.
"""

from __future__ import annotations

import numpy as np


def guidance(weight: float) -> tuple[float, float]:
    """Shares of the null and of the caption's prediction in e_w = null + w (cond - null); 0 is the caption's alone."""
    return (0.0, 1.0) if weight == 0 else (1.0 - weight, weight)


def quadratic(gram: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """Squared L2 norm, float64[...], of a combination of (z0, eps, null, cond).

    What has coefficient 0 is not read, so it may be unknown (NaN).
    """
    used = np.flatnonzero(coefficients)
    c = np.asarray(coefficients, dtype=np.float64)[used]
    return np.maximum(np.einsum("...ij,i,j->...", gram[..., used[:, None], used], c, c), 0.0)


def model_error(gram: np.ndarray, weight: float = 0.0) -> np.ndarray:
    """|eps - e_w|^2, summed over the latent, float64[...]."""
    return quadratic(gram, (0.0, 1.0, *(-share for share in guidance(weight))))


def latent_error(
    gram: np.ndarray, alpha: float, sigma: float, alpha_prev: float, sigma_prev: float, weight: float
) -> np.ndarray:
    """|prev - z0|^2, summed over the latent, float64[...]; the table's `latent_error` is this divided by d.

    prev = alpha_prev (z_t - sigma e_w) / alpha + sigma_prev e_w is the DDIM (or Euler) step from z_t, so
    prev - z0 = (alpha_prev - 1) z0 + (alpha_prev sigma / alpha) eps + (sigma_prev - alpha_prev sigma / alpha) e_w.

    Args:
        gram: float64[..., 4, 4] of (z0, eps, null, cond).
        alpha: Signal and `sigma` noise level at t; VP: sqrt(alpha_bar), sqrt(1 - alpha_bar).
        sigma: See `alpha`.
        alpha_prev: The same after the step, as `sigma_prev`.
        sigma_prev: See `alpha_prev`.
        weight: Guidance; 0 means the caption's prediction as it is.
    """
    kept = alpha_prev * sigma / alpha
    null, cond = (share * (sigma_prev - kept) for share in guidance(weight))
    return quadratic(gram, (alpha_prev - 1.0, kept, null, cond))
