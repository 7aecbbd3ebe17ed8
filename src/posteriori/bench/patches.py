"""Mixtures of Gaussians fitted to patches of photos: priors of pictures whose posteriors are known exactly.

Grey patches in [-1, 1] at random places of photos that were shrunk by half, fitted by scikit-learn's EM with full
covariances. A fit is kept with a hash of all it depends on.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from posteriori.bench.common import photo_files, say
from posteriori.checkpoint import write_atomically
from posteriori.priors import GaussianMixture

__all__ = ["PatchFit", "bundled_photos", "fit_name", "fit_patches", "patch_mixture", "read_patches"]


@dataclass(frozen=True)
class PatchFit:
    """How patch mixtures are fitted.

    Attributes:
        patches: drawn from all photos together.
        photos: how many photos, evenly spread over the sorted names.
        iterations: of EM, at most.
        ridge: added to the covariances' diagonal; images in [-1, 1].
        seed: of places and of the fit.
    """

    patches: int = 20_000
    photos: int = 200
    iterations: int = 20
    ridge: float = 1e-4
    seed: int = 0


def bundled_photos() -> Path:
    """The few photos that come with the package."""
    return Path(__file__).resolve().parents[1] / "assets" / "photos"


def read_patches(files: Sequence[Path], side: int, count: int, seed: int) -> np.ndarray:
    """``count`` grey patches in [-1, 1], ``(count, side^2)``, as many from every photo as the others."""
    rng = np.random.default_rng(seed)
    parts = []
    for number, file in enumerate(files):
        with Image.open(file) as opened:
            grey = opened.convert("L")
            small = grey.resize((grey.width // 2, grey.height // 2), Image.Resampling.BOX)
        pixels = np.asarray(small, dtype=np.float64) / 127.5 - 1
        here = count // len(files) + (number < count % len(files))
        if min(pixels.shape) < side:
            raise ValueError(f"{file.name} has {grey.width}x{grey.height} pixels, too few for patches of {side}")
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (side, side))
        rows = rng.integers(0, windows.shape[0], here)
        columns = rng.integers(0, windows.shape[1], here)
        parts.append(windows[rows, columns].reshape(here, side * side))
    return np.concatenate(parts)


def fit_name(folder: str | Path, d: int, components: int, fit: PatchFit) -> str:
    """Twelve hexadecimal digits of everything that a fit depends on.

    Raises:
        ValueError: when there is no photo in ``folder``.
    """
    photos = [(f.name, f.stat().st_size) for f in photo_files(folder or bundled_photos(), limit=fit.photos)]
    what = {"d": d, "components": components, **asdict(fit), "photos": photos}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def patch_mixture(folder: str | Path, d: int, components: int, fit: PatchFit, cache: Path) -> GaussianMixture:
    """The mixture fitted to patches of the photos in ``folder``, from ``cache`` when it was fitted before.

    Args:
        folder: of photos; the bundled ones when empty.
        d: pixels of a patch, a square.
        components: of the mixture.
        fit: how.
        cache: folder of fits.

    Raises:
        ValueError: when there is no photo, or one is too small.
    """
    from safetensors.torch import load_file, save

    side = math.isqrt(d)
    path = cache / f"patches-{side}x{side}-{components}-{fit_name(folder, d, components, fit)}.safetensors"
    if not path.exists():
        files = photo_files(folder or bundled_photos(), limit=fit.photos)
        say(f"fitting {components} components to {fit.patches} patches of {side}x{side} from {len(files)} photos")
        write_atomically(path, save(fit_patches(read_patches(files, side, fit.patches, fit.seed), components, fit)))
    kept = load_file(path)
    return GaussianMixture(kept["weights"], kept["means"], kept["covs"], shape=(1, side, side))


def fit_patches(patches: np.ndarray, components: int, fit: PatchFit) -> dict[str, torch.Tensor]:
    """Weights, means and covariances, float64."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture as Fit

    model = Fit(components, max_iter=fit.iterations, reg_covar=fit.ridge, random_state=fit.seed, tol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a prior, not an estimate: any stop will do
        model.fit(patches)
    found = {"weights": model.weights_, "means": model.means_, "covs": model.covariances_}
    return {k: torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)) for k, v in found.items()}
