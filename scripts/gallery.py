r"""One picture per operator: measurement, linear estimate, posterior mean, one posterior sample, truth.

    python scripts/gallery.py docs/figures/operators [--model photo] [--slices SLICES.npz] [--only NAME ...]

Where the bundled network was trained for the kind of measurement, it is the prior. Elsewhere the prior is a stationary
Gaussian with the power spectrum of photos, ``1/(f^2 + f_0^2)^1.2``, whose posterior is known exactly; its signals are
small (32x32), because that posterior is dense linear algebra. Photos are the bundled ones, so every picture can be
passed on (CC BY 2.0, authors beneath). Coils measure a slice of the file ``--slices`` (``images``, bytes ``(n, H, W)``)
under a Gaussian of the other slices' mean and power spectrum (:mod:`posteriori.bench.science`).
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

import posteriori as po
from posteriori import operators
from posteriori.bench.science import StationaryPrior, read_slices
from posteriori.checkpoint import write_atomically
from posteriori.demo import attribution, photos_folder
from posteriori.images import to_picture
from posteriori.pivot import linear_estimate
from posteriori.priors import Gaussian
from posteriori.sheets import contact_sheet
from posteriori.tasks import box_mask, free_form_mask, random_mask

SIGMA_Y, NFE, DATA_STD = 0.05, 20, 0.5

#: Who is to be named under pictures of the ICBM 152 average brain; docs/operators.md holds the whole notice.
BRAIN = "ICBM 152 brain, modified: (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, MNI, McGill University"


@dataclass(frozen=True)
class Entry:
    """An operator to show.

    Attributes:
        name: file name of the picture.
        title: text above it.
        make: the operator, given the signal's shape.
        photo: a bundled photo; empty for a slice of the file.
        network: whether the bundled network is the prior; else a Gaussian one.
        show: the measurement as a picture ``(C, H, W)``, given its parts when it is a stack; its own entries when left
            out.
    """

    name: str
    title: str
    make: Callable[[tuple[int, ...]], operators.LinearOperator]
    photo: str
    network: bool = True
    show: Callable[..., Tensor] | None = None


def _rng() -> np.random.Generator:
    return np.random.default_rng(3)


def _disk(radius: int) -> Tensor:
    axis = torch.arange(-radius, radius + 1)
    inside = (axis[:, None] ** 2 + axis**2 <= radius**2).float()
    return inside / inside.sum()


def _magnitude(y: Tensor) -> Tensor:
    """k-space ``(..., 2, H, W)``, of all coils, as the logarithm of its magnitude in [-1, 1], zero frequency in the
    middle."""
    size = y.square().flatten(0, -3).sum(0, keepdim=True).sqrt()
    size = (1 + 20 * size).log()
    return 2 * size / size.max() - 1


def _stretched(y: Tensor) -> Tensor:
    """Any numbers as grey levels."""
    flat = y.reshape(1, *y.shape[-2:]) if y.ndim > 2 else y.unsqueeze(0)
    return 2 * (flat - flat.min()) / (flat.max() - flat.min()).clamp_min(1e-9) - 1


def _square(y: Tensor) -> Tensor:
    """A list of numbers, row by row in a square."""
    side = math.ceil(y.numel() ** 0.5)
    return _stretched(functional.pad(y.flatten(), (0, side * side - y.numel())).reshape(1, side, side))


def _halves(first: Tensor, second: Tensor) -> Tensor:
    """Two measurements of one size: the left half of the first, the right half of the second."""
    middle = first.shape[-1] // 2
    return torch.cat([first[..., :middle], second[..., middle:]], -1)


STACK_SIGMAS = (0.02, 0.3)

ENTRIES = (
    Entry("inpainting-random", "Inpainting(mask): 70 % of the pixels missing",
          lambda s: operators.Inpainting(random_mask(s[-2:], 0.7, _rng())), "butterfly"),
    Entry("inpainting-box", "Inpainting(mask): a box missing",
          lambda s: operators.Inpainting(box_mask(s[-2:], (s[-2] // 3, s[-1] // 3))), "lake"),
    Entry("inpainting-strokes", "Inpainting(mask): free-form strokes missing",
          lambda s: operators.Inpainting(free_form_mask(s[-2:], _rng())), "pier"),
    Entry("denoising", "Identity()", lambda s: operators.Identity(), "turtle"),
    Entry("bayer", 'Bayer("RGGB"): one colour per pixel', lambda s: operators.Bayer("RGGB"), "butterfly", False),
    Entry("blur-gaussian", "GaussianBlur(3), reflect-padded", lambda s: operators.GaussianBlur(3.0), "turtle"),
    Entry("blur-motion", 'Blur(kernel, "circular"): camera shake',
          lambda s: operators.Blur(operators.motion_kernel(41, 0.5, 5), "circular"), "pier"),
    Entry("blur-defocus-reflect", 'Blur(disk, "reflect"): out of focus, by conjugate gradients',
          lambda s: operators.Blur(_disk(3), "reflect"), "aqueduct"),
    Entry("blur-valid", 'Blur(gaussian, "valid"): only where the kernel fits',
          lambda s: operators.GaussianBlur(2.0, boundary="valid"), "turtle"),
    Entry("downsampling-box", "Downsampling(4)", lambda s: operators.Downsampling(4), "aqueduct"),
    Entry("downsampling-bicubic", 'Downsampling(4, "bicubic")', lambda s: operators.Downsampling(4, "bicubic"), "lake"),
    Entry("downsampling-kernel", "Downsampling(4, disk, circular): any kernel, polyphase",
          lambda s: operators.Downsampling(4, _disk(3), boundary="circular"), "pier"),
    Entry("grayscale", "Grayscale(): colorization (Gaussian prior: colours are drawn, not recognised)",
          lambda s: operators.Grayscale(), "butterfly", False),
    Entry("hadamard", "Hadamard: 30 % of the coefficients",
          lambda s: operators.Hadamard(random_mask(s[-2:], 0.7, _rng())[0]), "lake", False, _square),
    Entry("dct", "DCT: 30 % of the coefficients",
          lambda s: operators.DCT(random_mask(s[-2:], 0.7, _rng())[0]), "aqueduct", False, _square),
    Entry("mri", "MRI(mask, real=True): radial k-space",
          lambda s: operators.MRI(operators.radial_mask(s[-2:], 12), real=True), "turtle", False, _magnitude),
    Entry("mri-coils", "MultiCoilMRI(mask, maps, real=True): 8 coils, 6x Cartesian",
          lambda s: operators.MultiCoilMRI(operators.cartesian_mask(s[-2:], 6, 0.06),
                                           operators.birdcage_maps(8, s[-2:]), real=True), "", False, _magnitude),
    Entry("ct", "Radon(angles): 20 views over 180 degrees",
          lambda s: operators.Radon(torch.arange(20) * 9.0, s[-2:]), "pier", False, _stretched),
    Entry("composition", "Inpainting(mask) @ GaussianBlur(1.5): blurred, then pixels lost",
          lambda s: operators.Inpainting(random_mask(s[-2:], 0.5, _rng())) @ operators.GaussianBlur(1.5), "lake"),
    Entry("stack", f"stack([GaussianBlur(2), Identity()], sigmas={list(STACK_SIGMAS)}): two pictures of one scene",
          lambda s: operators.stack([operators.GaussianBlur(2.0), operators.Identity()], STACK_SIGMAS, shape=s),
          "butterfly", True, _halves),
)  # fmt: skip


def photo(name: str, size: int) -> Tensor:
    """A bundled photo, its centre square brought to ``size``; ``(1, 3, size, size)``."""
    x = po.read_image(photos_folder() / f"{name}.png")
    side = min(x.shape[-2:])
    top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
    square = x[..., top : top + side, left : left + side]
    return functional.interpolate(square, size=(size, size), mode="area")


def gaussian_prior(shape: tuple[int, ...]) -> Gaussian:
    """Stationary Gaussian with the power spectrum of photos; channels, when several, correlated at 0.9."""
    c, h, w = shape
    f = (torch.fft.fftfreq(h)[:, None] ** 2 + torch.fft.fftfreq(w) ** 2).double()
    kernel = torch.fft.ifft2((f + 0.02**2) ** -1.2).real
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    i, j = rows.flatten(), columns.flatten()
    covariance = kernel[(i[:, None] - i) % h, (j[:, None] - j) % w]
    covariance = covariance / covariance[0, 0] * DATA_STD**2
    channels = torch.full((c, c), 0.9, dtype=torch.float64).fill_diagonal_(1.0)
    covariance = torch.kron(channels, covariance)
    return Gaussian(torch.zeros(c * h * w, dtype=torch.float64), covariance, shape=shape)


def sheet(entry: Entry, denoiser: po.NetworkDenoiser, slices: Tensor | None) -> Image.Image:
    """The picture of an operator."""
    size = 192
    if entry.network and not entry.make((3, size, size)).exact:
        size = 64  # small enough to be taken apart where iterations would be many
    if not entry.photo:
        assert slices is not None
        x_0 = slices[len(slices) // 4 * 2 + 1][None]  # the prior is of the even ones
    elif entry.network:
        x_0 = photo(entry.photo, size)
    else:
        colour = entry.name in ("grayscale", "bayer")
        x_0 = photo(entry.photo, 20 if colour else 32).double()
        x_0 = x_0 if colour else x_0.mean(1, keepdim=True)
    A = entry.make(tuple(x_0.shape[1:]))
    sigma_y = A.sigma_y if isinstance(A, operators.Stack) else SIGMA_Y
    y = po.measure(A, x_0, sigma_y, seed=1)
    zero = torch.zeros_like(x_0)
    linear = linear_estimate(zero, y, A, alpha_t=0.0, sigma_t=1.0, sigma_y=sigma_y, prior_std=DATA_STD)
    if not entry.photo:
        assert slices is not None
        stationary = StationaryPrior(slices[::2])
        mean = stationary.estimate(A, y, SIGMA_Y).x
        sample = stationary.sample(A, mean, y, SIGMA_Y, seed=2)
    else:
        prior: po.Denoiser = denoiser if entry.network else gaussian_prior(tuple(x_0.shape[1:]))
        posterior = po.ExactPosterior(prior, A, y, sigma_y)
        if isinstance(prior, Gaussian):
            mean = prior.posterior(A, y, SIGMA_Y).mean.reshape(x_0.shape)
        else:
            mean = posterior.mean()
        sample = po.sample(posterior, n=1, nfe=NFE, seed=2)[0]
    parts = [p[0] for p in (A.split(y) if isinstance(A, operators.Stack) else [y])]
    shown = entry.show(*parts) if entry.show else parts[0]

    def cell(caption: str, x: Tensor) -> tuple[str, Image.Image]:
        if x.shape[-2:] == x_0.shape[-2:] and caption != "truth" and caption != "measurement":
            error = float((x.clamp(-1, 1) - x_0[0]).square().mean())
            caption = f"{caption}\n{10 * math.log10(4 / error):.1f} dB"
        return caption, to_picture(x.float().clamp(-1, 1))

    kind = "1 evaluation of the bundled network" if entry.network else "exact, Gaussian prior"
    author = next((row["author"] for row in attribution() if row["file"].startswith(entry.photo)), "")
    credit = f"Photo, modified: {author}, CC BY 2.0" if entry.photo else BRAIN
    noise = "" if isinstance(A, operators.Stack) else f"sigma_y = {SIGMA_Y:g}; "
    return contact_sheet(
        [[
            cell("measurement", shown),
            cell("linear estimate", linear[0]),
            cell("posterior mean", mean[0]),
            cell("one posterior sample", sample[0]),
            cell("truth", x_0[0]),
        ]],
        heading=f"{entry.title}  [{A.solver}]",
        cell=192,
        footer=f"{noise}mean: {kind}. {credit}",
    )  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="photo", help="bundled name, folder or hub id")
    parser.add_argument("--slices", type=Path, help=".npz with an array `images`: bytes (n, H, W), for the coils")
    parser.add_argument("--only", nargs="+", help="names of pictures")
    args = parser.parse_args()
    denoiser = po.load(args.model)
    slices = read_slices(args.slices) if args.slices else None
    for entry in ENTRIES:
        if args.only and entry.name not in args.only:
            continue
        if not entry.photo and slices is None:
            print(f"{entry.name}: left out, it needs --slices")
            continue
        buffer = io.BytesIO()
        sheet(entry, denoiser, slices).save(buffer, "JPEG", quality=85)
        write_atomically(args.out / f"{entry.name}.jpg", buffer.getvalue())
        print(args.out / f"{entry.name}.jpg", flush=True)


if __name__ == "__main__":
    main()
