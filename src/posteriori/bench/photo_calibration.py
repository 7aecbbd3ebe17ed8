r"""Whether samples of a photo model can be believed: intervals, standard deviations and spectra beside the truth.

    python -m posteriori.bench.photo_calibration PHOTOS/test --model photo --out runs/photo-calibration \
        --size 128 --limit 6 --bf16 --document docs/model-photo.md

Given ``y``, the truth ``x_0`` and a posterior sample are exchangeable. Hence, with ``n`` samples ``x_i``,

    P(x_(k) <= x_0 <= x_(n+1-k)) = (n + 1 - 2k) / (n + 1)          entry by entry, x_(k) in order of size
    E (m_b - x_0)^2 = (1 + 1/b) E s_b^2                            m_b, s_b: mean and deviation of b samples
    E |W x_i|_f^2 = E |W x_0|_f^2                                  power at every frequency, under any window W

With 19 samples the intervals of 50 % and 90 % are exact. The second line holds for any choice of pixels that does not
look at ``x_0`` nor at those ``b`` samples: pixels are put into bins by the deviation of the *other* samples, so that a
bin does not collect the pixels whose deviation happened to come out small. Everything is pooled over photos: sums
first, then ratios; errors behind a ± leave one photo out at a time (jackknife).

The tasks, and each photo's mask, kernel and noise, are those of :mod:`posteriori.bench.photos`.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posteriori.bench.common import HalfPrecision, markdown_table, new_document, photo_files, replace_between, say
from posteriori.bench.photo_figures import reliability, spectra
from posteriori.bench.photos import TASKS, Problem
from posteriori.bench.runner import Cell, Row, Rows, measure_cells
from posteriori.checkpoint import load, read_card
from posteriori.denoise import NetworkDenoiser
from posteriori.metrics import coverage
from posteriori.posterior import ExactPosterior
from posteriori.sample import sample

__all__ = ["LEVELS", "STD_EDGES", "band_edges", "band_power", "calibration", "jackknife", "main", "pooled", "table"]

LEVELS = (0.5, 0.9)
#: Bins of the predicted standard deviation, half an octave each; images are in [-1, 1].
STD_EDGES = np.concatenate([[0.0], 2.0 ** np.arange(-8, 0.51, 0.5), [np.inf]])
SMALLEST_BIN = 2e-3  # share of the pixels below which a bin is neither shown nor fitted
POINTS, TOLERANCE = 5, 0.1  # the targets: points of coverage, and the power of samples over that of the truth
MARKER = "photo-calibration"
NAMES = {
    "random": "random inpainting, 70 % missing",
    "box": "box inpainting",
    "sr": "4x super-resolution",
    "gaussian": "Gaussian blur, sigma 3",
    "motion": "motion blur",
}


def band_edges(size: int) -> np.ndarray:
    """Edges of bands of half an octave in cycles per pixel, from 1.5 cycles per picture to Nyquist's 0.5.

    Raises:
        ValueError: when there is no such band.
    """
    if size < 6:
        raise ValueError(f"pictures of {size}x{size} pixels are too small for a spectrum: take at least 6x6")
    count = int(np.floor(2 * np.log2(0.5 * size / 1.5)))
    return 0.5 * 2.0 ** (-0.5 * np.arange(count, -1, -1))


def band_power(x: Tensor) -> Tensor:
    """Power of every picture ``(B, C, H, W)``, ``H = W``, averaged over colours and the frequencies of a band.

    A Hann window takes out the jump from one border to the other; each colour's mean under the window is subtracted.

    Returns:
        ``(B, bands)``, float64, between the :func:`band_edges` of the size.
    """
    size = x.shape[-1]
    if x.shape[-2] != size:
        raise ValueError(f"the spectrum is taken of square pictures, got {tuple(x.shape[-2:])}: crop them")
    hann = torch.hann_window(size, dtype=torch.float64, device=x.device)
    window = hann[:, None] * hann
    x = x.double()
    centred = (x - (x * window).sum((-2, -1), keepdim=True) / window.sum()) * window
    power = torch.fft.fft2(centred).abs().square().mean(1).flatten(1) / window.square().sum()
    f = torch.fft.fftfreq(size, dtype=torch.float64)
    radius = (f[:, None].square() + f.square()).sqrt().flatten().numpy()
    edges = band_edges(size)
    band = np.digitize(radius * (1 + 1e-12), edges) - 1  # the last edge, and what lies outside, belongs to no band
    return torch.stack([power[:, torch.from_numpy(band == k)].mean(1) for k in range(len(edges) - 1)], 1)


def calibration(samples: Tensor, mean: Tensor, x_0: Tensor, observed: Tensor | None = None) -> Row:
    """What :func:`pooled` needs to know of one measurement, or of a batch of them.

    Args:
        samples: ``(n, B, C, H, W)``, ``n >= 4``.
        mean: the estimate of one evaluation, ``(B, C, H, W)``, for its spectrum.
        x_0: the truth, ``(B, C, H, W)``.
        observed: which pixels were measured, if that is what the task is about; broadcasts to ``x_0``.

    Returns:
        Sums and shares as plain numbers, with ``pixels``, how many entries they are of.
    """
    n = len(samples)
    if n < 4:
        raise ValueError(f"calibration needs at least 4 samples, got {n}")
    row: Row = {"pixels": x_0.numel()}
    for level in LEVELS:
        row[f"coverage_{level:g}"], row[f"nominal_{level:g}"] = coverage(samples, x_0, level)
    if observed is not None:
        missing = (observed <= 0).expand_as(x_0)
        row["missing"] = {"pixels": int(missing.sum())}
        for level in LEVELS:
            row["missing"][f"coverage_{level:g}"] = coverage(samples[:, missing], x_0[missing], level)[0]
    sorter, rest = samples[: n // 2].double(), samples[n // 2 :].double()
    squares = (rest.mean(0) - x_0.double()).square() / (1 + 1 / len(rest))
    bins = np.digitize(sorter.std(0).flatten().cpu().numpy(), STD_EDGES) - 1
    for name, values in (("count", None), ("variance", rest.var(0)), ("squares", squares)):
        weights = None if values is None else values.flatten().cpu().numpy()
        row[name] = np.bincount(bins, weights, minlength=len(STD_EDGES) - 1).tolist()
    row["size"] = x_0.shape[-1]
    row["power_sample"] = torch.stack([band_power(x).sum(0) for x in samples]).mean(0).tolist()
    row["power_mean"], row["power_truth"] = (band_power(x).sum(0).tolist() for x in (mean, x_0))
    return row


def pooled(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Figures of one task from the rows of its photos; every value is an array, of one entry where it is a number.

    ``coverage_*`` and ``missing_*``: share of entries inside the interval. ``ratio``: error of the mean over what the
    deviation of the samples predicts, 1 is right. ``slope``: of the logarithm of the error on that of the deviation,
    over bins. ``std``, ``error``: of every bin (nan: too few pixels). ``sample``, ``mean``: power over that of the
    truth in every band; ``truth``: its power.
    """

    def total(name: str) -> np.ndarray:
        return np.sum([r[name] for r in rows], axis=0)

    def share(parts: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
        weights = [p["pixels"] for p in parts]
        return np.atleast_1d(np.average([p[name] for p in parts], weights=weights))

    found = {f"coverage_{level:g}": share(rows, f"coverage_{level:g}") for level in LEVELS}
    if all("missing" in r for r in rows):
        parts = [r["missing"] for r in rows]
        found |= {f"missing_{level:g}": share(parts, f"coverage_{level:g}") for level in LEVELS}
    count, variance, squares = total("count"), total("variance"), total("squares")
    enough = count > SMALLEST_BIN * count.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        found["std"] = np.where(enough, np.sqrt(variance / count), np.nan)
        found["error"] = np.where(enough, np.sqrt(squares / count), np.nan)
    found["ratio"] = np.atleast_1d(np.sqrt(squares.sum() / variance.sum()))
    if int(enough.sum()) > 1:
        line = np.polyfit(np.log(found["std"][enough]), np.log(found["error"][enough]), 1, w=np.sqrt(count[enough]))
        found["slope"] = line[:1]
    truth = total("power_truth")
    found |= {"truth": truth / len(rows), **{k: total(f"power_{k}") / truth for k in ("sample", "mean")}}
    return found


def jackknife(rows: Sequence[Row], statistic: Callable[[Sequence[Row]], np.ndarray]) -> np.ndarray:
    """Standard error of a statistic of photos, from what it is without each of them; nan for fewer than two."""
    n = len(rows)
    if n < 2:
        return np.full_like(statistic(rows), np.nan)
    values = np.stack([statistic([*rows[:i], *rows[i + 1 :]]) for i in range(n)])
    return np.asarray(np.sqrt((n - 1) * values.var(0)))


def _cell(rows: Sequence[Row], name: str) -> str:
    """Value ± error of a number of :func:`pooled`."""
    found = pooled(rows)
    if name not in found:
        return ""
    error = float(jackknife(rows, lambda some: pooled(some)[name])[0])
    return f"{found[name][0]:.2f}" + ("" if np.isnan(error) else f" ± {error:.2f}")


def _share(rows: Sequence[Row], name: str, right: float) -> str:
    """Share in per cent ± error; in bold within the target of the right one."""
    value = 100 * float(pooled(rows)[name][0])
    error = 100 * float(jackknife(rows, lambda some: pooled(some)[name])[0])
    text = f"**{value:.1f}**" if abs(value - 100 * right) <= POINTS else f"{value:.1f}"
    return text if np.isnan(error) else f"{text} ± {error:.1f}"


def _spectrum(rows: Sequence[Row]) -> tuple[str, str]:
    """Lowest and highest ratio of the samples' power up to half of Nyquist, bold within the target, ± the error of the
    worse of the two; and that of the mean's power just below half of Nyquist."""
    below = band_edges(rows[0]["size"])[1:] <= 0.25 * (1 + 1e-9)
    found = pooled(rows)
    ratio, error = found["sample"][below], jackknife(rows, lambda some: pooled(some)["sample"])[below]
    worst = int(np.abs(np.log(ratio)).argmax())
    text = f"{ratio.min():.2f} to {ratio.max():.2f}"
    text = f"**{text}**" if np.abs(ratio - 1).max() <= TOLERANCE else text
    return text + ("" if np.isnan(error[worst]) else f" ± {error[worst]:.2f}"), f"{found['mean'][below][-1]:.2f}"


def table(by_task: Mapping[str, Sequence[Row]]) -> str:
    """The figures of all tasks in Markdown; what is within the target is bold."""
    lines = []
    right = [next(iter(by_task.values()))[0][f"nominal_{level:g}"] for level in LEVELS]
    for task, rows in by_task.items():
        shares = [_share(rows, f"coverage_{level:g}", p) for level, p in zip(LEVELS, right, strict=True)]
        lines.append([NAMES.get(task, task), *shares, _cell(rows, "ratio"), _cell(rows, "slope"), *_spectrum(rows)])
        if all("missing" in r for r in rows):
            shares = [_share(rows, f"missing_{level:g}", p) for level, p in zip(LEVELS, right, strict=True)]
            lines.append(["its missing pixels alone", *shares, "", "", "", ""])
    header = ["task", *[f"in {100 * p:.0f} % interval" for p in right], "error / deviation (1)", "slope (1)",
              "power of samples / truth (1)", "of mean / truth"]  # fmt: skip
    return markdown_table(header, lines)


def calibration_cells(args: Any, denoiser: Callable[[], NetworkDenoiser], version: str) -> Iterator[Cell]:
    """A cell for every task and photo of the command line."""

    def compute(path: Path, task: str) -> Row:
        problem = Problem(path, task, args.size, args.sigma_y)
        posterior = ExactPosterior(denoiser(), problem.A, problem.y.to(args.device), problem.sigma_y)
        drawn = sample(posterior, n=args.samples, nfe=args.nfe, seed=problem.seed).cpu()
        observed = problem.A.observed(problem.y) if task in ("random", "box") else None
        return calibration(drawn, posterior.mean().cpu(), problem.x_0, observed)

    for path in photo_files(args.photos, args.match, args.limit):
        for task in args.tasks.split(","):
            key = {k: getattr(args, k) for k in ("size", "sigma_y", "samples", "nfe", "bf16")}
            yield Cell({"task": task, "photo": path.name, "model": version, **key}, partial(compute, path, task))


def report(by_task: Mapping[str, Sequence[Row]], document: Path, figures: Path) -> None:
    """Both figures, and between its markers the table of the document (a new document has nothing else)."""
    row = next(iter(by_task.values()))[0]
    found = {NAMES.get(task, task): pooled(rows) for task, rows in by_task.items()}
    reliability(found, figures / "photo-calibration.png")
    spectra(found, band_edges(row["size"]), figures / "photo-spectrum.png")
    counts = sorted({len(rows) for rows in by_task.values()})
    photos = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    text = (
        f"{photos} photos of {row['size']}x{row['size']} pixels, {row['samples']} samples of {row['nfe']} evaluations "
        f"each, `sigma_y = {row['sigma_y']:g}`, model `{row['model']}`. Bold: within the target, 5 points for "
        "intervals, 10 % for the power of samples in every band of half an octave up to half of Nyquist (lowest to "
        f"highest band). The last column is the power of the mean just below half of Nyquist."
    )
    new_document(document, MARKER)
    replace_between(document, MARKER, f"{textwrap.fill(text, 120)}\n\n{table(by_task)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m posteriori.bench.photo_calibration", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("photos", help="folder with the photos to measure on")
    parser.add_argument("--out", required=True, type=Path, help="folder for rows; a run continues what it finds there")
    parser.add_argument("--model", default="photo", help="bundled name or folder")
    parser.add_argument("--document", type=Path, help="Markdown file with markers; OUT/report.md when left out")
    parser.add_argument("--figures", type=Path, help="folder of the figures; figures beside the document")
    parser.add_argument("--samples", type=int, default=19, help="per photo; 19 make both intervals exact")
    parser.add_argument("--nfe", type=int, default=8, help="network evaluations per sample")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--match", default=".*", help="regular expression that names of photos match in full")
    parser.add_argument("--limit", type=int, help="this many photos, evenly spread")
    parser.add_argument(
        "--rows", type=int, help="measure at most so many rows now; 0: only the report of those there are"
    )
    parser.add_argument("--size", type=int, default=256, help="side of the centre crop")
    parser.add_argument("--sigma-y", type=float, default=0.05, help="measurement noise; photos are in [-1, 1]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--bf16", action="store_true", help="network in bfloat16")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)

    @lru_cache(maxsize=1)
    def denoiser() -> NetworkDenoiser:
        model = load(args.model, args.device)
        if args.bf16:
            model.backbone = HalfPrecision(model.backbone)
        return model

    rows = Rows(args.out / "rows.jsonl")
    cells = partial(calibration_cells, args, denoiser, str(read_card(args.model)["sha256"])[:12])
    measure_cells(cells(), rows, args.rows)
    found = [r for r in rows.of(cells()) if "pixels" in r]
    by_task = {t: own for t in args.tasks.split(",") if (own := [r for r in found if r["task"] == t])}
    document = args.document or args.out / "report.md"
    report(by_task, document, args.figures or document.parent / "figures")
    say(f"\n{table(by_task)}\n\nreport: {document}")


if __name__ == "__main__":
    main()
