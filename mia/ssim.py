"""Structural similarity of two pictures, as its authors define it."""

from __future__ import annotations

import numpy as np

from mia.errors import UserError

RADIUS, SIGMA = 5, 1.5
K1, K2 = 0.01, 0.03
GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2, what Pillow's mode L rounds


def grey(images: np.ndarray) -> np.ndarray:
    """Luma on 0..255, float64[..., H, W], of images [..., H, W, 3]; not rounded: a mean image keeps its tones."""
    return np.asarray(images, dtype=np.float64) @ np.array(GREY)


def ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Mean structural similarity of two grey pictures on 0..255, each [H, W]; 1 for equal ones.

    A Gaussian window of 11 x 11, sigma 1.5, averaged over the places where it fits; K1 0.01, K2 0.03, range 255.

    Raises:
        UserError: the pictures differ in size, or the window fits nowhere.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004, section III. The variances are the population's, as there.
    """
    from scipy.ndimage import correlate1d

    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or min(x.shape) < 2 * RADIUS + 1:
        raise UserError(f"pictures of {x.shape} and {y.shape}", "ssim", f"give equal sides of {2 * RADIUS + 1} or more")
    window = np.exp(-(np.arange(-RADIUS, RADIUS + 1) ** 2) / (2 * SIGMA**2))
    window /= window.sum()

    def mean(values: np.ndarray) -> np.ndarray:
        blurred = correlate1d(correlate1d(values, window, 0), window, 1)
        return blurred[RADIUS:-RADIUS, RADIUS:-RADIUS]

    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    mx, my = mean(x), mean(y)
    vx, vy, cross = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return float((((2 * mx * my + c1) * (2 * cross + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
