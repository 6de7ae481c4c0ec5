"""The images of a prompt, and how they are read from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from csp_ext.demo.console import UserError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Photograph:
    """A picture in RGB and the name it goes by."""

    name: str
    image: Image


def read(path: Path) -> Photograph:
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
    return Photograph(path.stem, image)
