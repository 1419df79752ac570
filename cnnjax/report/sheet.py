"""Contact sheets: some images of each split and class, as a PNG or an HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cnnjax.machine.files import write_atomically
from cnnjax.report.template import render

_SIDE, _TITLE, _GAP = 160, 24, 4  # pixels

Rows = Mapping[tuple[str, str], Sequence[tuple[str, np.ndarray]]]


def write_sheet(path: Path, title: str, rows: Rows) -> None:
    """Writes a contact sheet.

    Args:
        path: the output file: an HTML page if it ends in .html, otherwise a PNG.
        title: title of the page.
        rows: images as (name, uint8 [size, size]), by split and class.
    """
    if path.suffix.lower() == ".html":
        pictures = [
            (split, name, [(image, _address(pixels)) for image, pixels in images])
            for (split, name), images in rows.items()
        ]
        with write_atomically(path) as file:
            file.write(render("sheet.html.jinja", {}, title=title, rows=pictures))
        return
    columns = max(map(len, rows.values()))
    step = _SIDE + _GAP
    sheet = Image.new("L", (columns * step + _GAP, len(rows) * (step + _TITLE) + _GAP), 255)
    draw = ImageDraw.Draw(sheet)
    for row, ((split, name), images) in enumerate(rows.items()):
        top = row * (step + _TITLE) + _GAP
        draw.text((_GAP, top + 4), f"{split}: {name}", fill=0)
        for column, (_, pixels) in enumerate(images):
            sheet.paste(_small(pixels), (column * step + _GAP, top + _TITLE))
    sheet.save(path, "PNG")


def _small(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)


def _address(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    _small(pixels).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
