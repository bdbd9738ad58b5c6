"""The language of captions, for sources that do not say it.

The detector is ELD-C: its model lies in the wheel, nothing is fetched, and an answer depends on the text alone. It was
chosen by measurement (`docs/decisions.md`); the paper used CLD3 (arXiv 2306.12983, `laion-mi/`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import polars as pl


def detect(captions: pl.Series) -> pl.Series:
    """The ISO 639-1 code of each caption's language, String[n]; null where it is null or no language can be told."""
    one = _detector()
    found = [one(text) if text else "und" for text in captions.to_list()]
    return pl.Series(captions.name, found, pl.String).replace("und", None)


@functools.cache
def _detector() -> Callable[[str], str]:
    import eldc

    eldc.init()
    return eldc.detect
