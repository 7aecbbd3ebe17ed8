"""Damage as real photos have it: scratches, a torn corner, noise of several kinds, blur, JPEG files, thumbnails.

Photos are 8-bit RGB pictures, before and after: what a file holds is clipped and rounded. Everything random comes from
the generator that is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = [
    "GRAIN", "PHOTONS", "Damaged", "blurred", "coarse_noise", "grain_power", "photon_noise", "scratched", "thumbnail",
    "torn", "white_noise",
]  # fmt: skip

PHOTONS = 150  # of a white pixel
GRAIN = 0.8  # width in pixels of the Gaussian that makes noise coarse


@dataclass(frozen=True)
class Damaged:
    """A damaged photo.

    Attributes:
        picture: what is given to the command.
        truth: what it should become.
        quality: of the JPEG it is saved as; ``None``: a PNG.
        mask: white = missing.
    """

    picture: Image.Image
    truth: Image.Image
    quality: int | None = None
    mask: Image.Image | None = None


def _values(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.float64) / 255


def _picture(values: np.ndarray) -> Image.Image:
    """8 bits, clipped and rounded as a file's are."""
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def white_noise(picture: Image.Image, sigma_y: float, rng: np.random.Generator) -> Image.Image:
    """White Gaussian noise; ``sigma_y`` in the units of images in [-1, 1], which are half of those in [0, 1]."""
    values = _values(picture)
    return _picture(values + 0.5 * sigma_y * rng.standard_normal(values.shape))


def photon_noise(picture: Image.Image, photons: float, rng: np.random.Generator) -> Image.Image:
    """Poisson counts, ``photons`` on average where the picture is white."""
    return _picture(rng.poisson(_values(picture) * photons) / photons)


def coarse_noise(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Noise of deviation 0.1 (images in [-1, 1]) that is as coarse as a Gaussian of :data:`GRAIN` pixels makes it."""
    values = _values(picture)
    noise_ = np.fft.ifft2(
        np.fft.fft2(rng.standard_normal(values.shape), axes=(0, 1)) * np.sqrt(grain_power(values.shape[:2]))[..., None],
        axes=(0, 1),
    ).real
    return _picture(values + 0.5 * 0.1 * noise_)


def grain_power(size: tuple[int, int]) -> np.ndarray:
    """Power of the coarse noise at every frequency, mean 1: a Gaussian, and a little white noise as every scan has."""
    f = np.fft.fftfreq(size[0])[:, None] ** 2 + np.fft.fftfreq(size[1]) ** 2
    power = np.exp(-((2 * np.pi * GRAIN) ** 2) * f)
    return np.asarray(0.98 * power / power.mean() + 0.02)


def scratched(picture: Image.Image, rng: np.random.Generator) -> Damaged:
    """White scratches and dust; the mask is a pixel wider than the damage, as one painted by hand should be."""
    layer = Image.new("L", picture.size)
    draw = ImageDraw.Draw(layer)
    w, h = picture.size
    for _ in range(9):
        x, y = rng.uniform(0, w), rng.uniform(0, h)
        points = [(x, y)]
        angle = rng.uniform(0, np.pi)
        for _ in range(int(rng.integers(3, 7))):
            angle += rng.normal(0, 0.25)
            points.append((points[-1][0] + 30 * np.cos(angle), points[-1][1] + 30 * np.sin(angle)))
        draw.line(points, fill=255, width=int(rng.integers(1, 4)))
    for _ in range(40):
        x, y, r = rng.uniform(0, w), rng.uniform(0, h), rng.uniform(0.5, 2.5)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    noisy = _values(white_noise(picture, 0.04, rng))
    scratched = np.where(np.asarray(layer)[..., None] > 0, rng.uniform(0.88, 1.0, (h, w, 1)), noisy)
    return Damaged(_picture(scratched), picture, mask=layer.filter(ImageFilter.MaxFilter(3)))


def torn(picture: Image.Image, rng: np.random.Generator) -> Damaged:
    """A corner is missing."""
    layer = Image.new("L", picture.size)
    w, h = picture.size
    edge = [(w * 0.45, 0), (w * 0.6, h * 0.12), (w * 0.7, h * 0.3), (w * 0.85, h * 0.38), (w, h * 0.55), (w, 0)]
    ImageDraw.Draw(layer).polygon(edge, fill=255)
    noisy = _values(white_noise(picture, 0.04, rng))
    return Damaged(_picture(np.where(np.asarray(layer)[..., None] > 0, 0.93, noisy)), picture, mask=layer)


def blurred(picture: Image.Image, rng: np.random.Generator) -> Damaged:
    """Out of focus, some noise, then saved as a phone does."""
    return Damaged(white_noise(picture.filter(ImageFilter.GaussianBlur(1.8)), 0.03, rng), picture, quality=92)


def thumbnail(picture: Image.Image, rng: np.random.Generator) -> Damaged:
    """A thumbnail made by a program that smooths before it shrinks, saved as a JPEG."""
    w, h = picture.size
    return Damaged(picture.resize((w // 4, h // 4), Image.Resampling.BICUBIC), picture, quality=90)
