"""Contact sheets with captions, and maps of uncertainty with their scale. Pillow and its built-in font only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["contact_sheet", "std_colours", "std_map", "with_colour_bar"]

BACKGROUND, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
# Dark to bright with monotone lightness, so that the map also reads in grey (anchors of matplotlib's "inferno").
_ANCHORS = np.array(
    [(0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10),
     (249, 201, 50), (252, 255, 164)], dtype=np.float64,
)  # fmt: skip


def std_colours(values: Tensor) -> Image.Image:
    """Picture of ``(H, W)`` values in [0, 1], dark to bright."""
    v = values.detach().double().cpu().clamp(0, 1).numpy()
    places = np.linspace(0, 1, len(_ANCHORS))
    channels = [np.interp(v, places, _ANCHORS[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def std_map(std: Tensor) -> tuple[Image.Image, float]:
    """Picture of a standard deviation ``(C, H, W)``, and the value its brightest colour stands for.

    Channels are combined as a root mean square; the scale ends at the 99.5th percentile, rounded up to two digits.
    """
    s = std.detach().double().square().mean(0).sqrt()
    top = float(torch.quantile(s.flatten()[:: max(1, s.numel() // 1_000_000)], 0.995))
    if not top > 0:
        return std_colours(torch.zeros_like(s)), 0.0
    digits = 10.0 ** (np.floor(np.log10(top)) - 1)
    top = float(np.ceil(top / digits * (1 - 1e-9)) * digits)
    return std_colours(s / top), top


def with_colour_bar(picture: Image.Image, top: float) -> Image.Image:
    """The picture with a colour bar along its lower edge, labelled in units of [-1, 1] and of 0-255."""
    width, height = picture.size
    bar_height = max(8, height // 24)
    size = max(9, min(height, width) // 20)
    font = ImageFont.load_default(size=size)
    bar = std_colours(torch.linspace(0, 1, width).expand(bar_height, width))
    result = picture.copy()
    result.paste(bar, (0, height - bar_height))
    draw = ImageDraw.Draw(result)
    baseline = height - bar_height - size - 4
    draw.rectangle((0, baseline, width, height - bar_height), fill=(0, 0, 0))
    draw.text((2, baseline), "0", fill="white", font=font)
    label = f"{top:.2g} ({top * 127.5:.2g}/255)"
    draw.text((width - 2 - draw.textlength(label, font=font), baseline), label, fill="white", font=font)
    return result


def contact_sheet(
    rows: Sequence[Sequence[tuple[str, Image.Image | None]]],
    titles: Sequence[str] | None = None,
    heading: str = "",
    cell: int = 256,
    footer: str = "",
) -> Image.Image:
    """Pictures in a grid, a caption under each.

    Args:
        rows: for every row its ``(caption, picture)`` pairs; lines of a caption are split at newlines, ``None`` leaves
            a place empty.
        titles: text before every row.
        heading: text above everything.
        cell: pixels of a picture's longer side; larger pictures are shrunk, smaller ones enlarged without smoothing.
        footer: small text below everything.
    """
    pad, size = max(6, cell // 32), max(12, cell // 16)
    font, bold = ImageFont.load_default(size=size), ImageFont.load_default(size=size * 1.35)
    line = round(size * 1.3)
    shapes = [p.size for row in rows for _, p in row if p is not None]
    width = round(cell * max(min(1.0, w / h) for w, h in shapes))
    height = round(cell * max(min(1.0, h / w) for w, h in shapes))
    captions = max((caption.count("\n") + 1 for row in rows for caption, _ in row), default=1) * line
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = pad
    if titles:
        lines = [text for title in titles for text in title.split("\n")]
        left += round(max(ruler.textlength(text, font=font) for text in lines)) + pad
    top = pad + (round(size * 1.35 * 1.4) + pad if heading else 0)
    columns = max(len(row) for row in rows)
    total_width = left + columns * (width + pad)
    total_height = top + len(rows) * (height + captions + pad) + (line + pad if footer else 0)
    sheet = Image.new("RGB", (total_width, total_height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if heading:
        draw.text((pad, pad), heading, fill=INK, font=bold)
    for r, row in enumerate(rows):
        y = top + r * (height + captions + pad)
        if titles:
            draw.multiline_text((pad, y + pad), titles[r], fill=INK, font=font, spacing=size // 4)
        for c, (caption, picture) in enumerate(row):
            x = left + c * (width + pad)
            if picture is not None:
                shown = _fit(picture, width, height)
                sheet.paste(shown, (x + (width - shown.width) // 2, y + (height - shown.height) // 2))
            for k, text in enumerate(caption.split("\n")):
                draw.text((x, y + height + 2 + k * line), text, fill=INK if k == 0 else FAINT, font=font)
    if footer:
        draw.text((pad, total_height - line - pad), footer, fill=FAINT, font=font)
    return sheet


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture over white where it is transparent, scaled into the cell."""
    if picture.mode in ("RGBA", "LA"):
        rgba = picture.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
        picture = Image.alpha_composite(ground, rgba)
    picture = picture.convert("RGB")
    factor = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    if size == picture.size:
        return picture
    return picture.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST)
