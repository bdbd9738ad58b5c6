"""From the bytes of an image to its pixels: the one way every stage decodes, flattens and crops."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib

import numpy as np
from PIL import Image, ImageFile

# What web pages show. Pillow knows forty more; among them are readers that start other programs (EPS) and containers
# that hide a large picture behind a small header (ICO), and these bytes come from strangers.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000")

# Pillow documents OSError; its readers let the others through when a file lies about itself (AVIF a RuntimeError).
_CORRUPT = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, RuntimeError,
            struct.error, zlib.error)  # fmt: skip

_LONGEST_STRIP = 16  # times its width

# A few readers warn of their own accord between Pillow's limit and twice it; `decode` has a limit of its own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(Exception):
    """An image that is not to be had: `status`, one of `tables.IMAGE_STATUSES`, and `detail`, one plain short line."""

    def __init__(self, status: str, detail: str) -> None:
        printable = "".join(c if c.isprintable() else " " for c in detail)
        self.status, self.detail = status, " ".join(printable.split())[:200]
        super().__init__(f"{status}: {self.detail}")


def decode(data: bytes, max_pixels: int = sys.maxsize) -> Image.Image:
    """The first frame of an encoded image as RGB on white, fully read, its `format` kept ('JPEG', 'PNG', ...).

    Stages after `images` decode only what passed its `max_pixels`, and give none. EXIF orientation is left as it is.
    Above 178,956,970 pixels some of Pillow's readers refuse, whatever `max_pixels`.

    Raises:
        ImageError: `not_an_image` when the first bytes are of no known format, `too_many_pixels` when the header says
            more than `max_pixels` (nothing has been decoded by then), `undecodable` when the file breaks off or lies.
    """
    try:
        source = _opened(data)
        if source.width * source.height > max_pixels:
            raise ImageError("too_many_pixels", f"{source.width} x {source.height} pixels, more than {max_pixels}")
        source.load()
        image = _on_white(source)
    except Image.DecompressionBombError as problem:
        raise ImageError("too_many_pixels", f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels") from problem
    except _CORRUPT as problem:
        raise ImageError("undecodable", str(problem)) from problem
    image.format = source.format
    return image


def _opened(data: bytes) -> ImageFile.ImageFile:
    """The image with its header read. `Image.open` would not say whether the format or the file is at fault."""
    Image.init()
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts is not None and accepts(data[:16]) is True:
            return factory(io.BytesIO(data), "")
    raise ImageError("not_an_image", "no known image format" if data else "empty body")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip at 255; the high byte is what it keeps of 16-bit colour
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """A square image at another size, uint8[side, side, 3], as `centre_square` resizes."""
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


def centre_square(image: Image.Image, side: int) -> np.ndarray:
    """The middle of an RGB image whose shorter side is scaled to `side`, uint8[side, side, 3].

    Equal to torchvision's `Resize(side)` (bilinear, antialiased) and `CenterCrop(side)` on a PIL image. A strip more
    than 16 times as long as wide differs by rounding: only its middle is resized, where torchvision would ask for
    memory without limit.

    Source: torchvision 0.28, `transforms.functional.resize` and `center_crop`.
    """
    width, height = image.size
    shorter = min(width, height)
    scaled = int(side * width / shorter), int(side * height / shorter)
    left, top = round((scaled[0] - side) / 2), round((scaled[1] - side) / 2)
    box = (left, top, left + side, top + side)
    if max(scaled) <= _LONGEST_STRIP * side:
        return np.array(image.resize(scaled, Image.Resampling.BILINEAR).crop(box))
    across, down = width / scaled[0], height / scaled[1]
    part = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return np.array(image.resize((side, side), Image.Resampling.BILINEAR, box=part))
