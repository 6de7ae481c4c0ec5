"""Photographs: those that come inside scikit-image's wheel, and the user's own files."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from csp_ext.demo.console import UserError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

# Files of the wheel itself: asking skimage.data for other pictures would download them.
BUNDLED = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
}


@dataclass(frozen=True)
class Photograph:
    """A picture in RGB and the name it goes by."""

    name: str
    image: Image


def read(path: Path, name: str | None = None) -> Photograph:
    """Read an image file, upright and in RGB.

    Raises
    ------
    UserError
        If it is not there or no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist") from None
    except UnidentifiedImageError:
        raise UserError(f"image {path} is not in a format that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be read: {first_line(error)}") from None
    return Photograph(name or path.stem, image)


def bundled() -> list[Photograph]:
    """Return the demo's photographs, in a fixed order; nothing is downloaded."""
    folder = Path(str(importlib.resources.files("skimage"))) / "data"
    return [read(folder / file, name) for name, file in BUNDLED.items()]
