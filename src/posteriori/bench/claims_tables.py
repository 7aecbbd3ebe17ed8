"""Verdicts on the main tables: who is best, in which order, by how much, and what one evaluation gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.stats import kendalltau

from posteriori.bench.claims_common import (
    Claim,
    Evidence,
    Finding,
    Interval,
    Part,
    above,
    below,
    frechet,
    ratio,
    within,
)
from posteriori.bench.images_pool import entries
from posteriori.perceptual import mmd

__all__ = ["CLAIMS", "METRICS", "cells_won", "our_table"]

# Column of the paper -> our column, and whether larger is better. The networks behind features differ.
METRICS = {
    "psnr": ("psnr", True), "ssim": ("ssim", True), "lpips": ("distance", False), "fid": ("frechet", False),
    "mmd_pixel": ("mmd_pixel", False), "mmd_inception": ("mmd", False), "crps_pixel": ("crps", False),
    "crps_inception": ("crps_features", False),
}  # fmt: skip
OF_SETS = ("frechet", "mmd", "mmd_pixel")
APPROXIMATIONS = ("dps", "daps", "ddnm", "pigdm", "mpgd")  # training-free methods that the paper compares
TRAINED = ("eps", "palette")
EXTREME = {"random95": "random", "sr16": "sr4"}
Lines = Sequence[tuple[str, int, Mapping[str, float]]]


def our_table(evidence: Evidence, task: str) -> list[tuple[str, int, dict[str, float]]]:
    """A task's lines with the paper's columns, as :func:`posteriori.bench.images_pool.entries` pools them. Distances
    between sets: only of the lines with the largest set."""
    rows = [r for r in evidence.rows if r["task"] == task and not r["method"].startswith("eps-")]  # no variants
    lines = []
    pooled = entries(rows, None, evidence.known)
    sets = {}
    for i, e in enumerate(pooled):
        found = [] if e.set_images else evidence.pooled(task, e.method, e.nfe)[:1]
        if found and evidence.enough(found[0]):
            drawn, true = (torch.from_numpy(np.stack([p[k] for p in found[0].values()])).float() for k in (0, 1))
            e.values |= {"frechet": frechet(true, drawn), "mmd": mmd(true, drawn)}
        sets[i] = e.set_images or len(found[0] if found else ())
    for i, e in enumerate(pooled):
        kept = {k: v for k, v in e.values.items() if k not in OF_SETS or sets[i] == max(sets.values())}
        lines.append((e.method, e.nfe, {paper: kept[own] for paper, (own, _) in METRICS.items() if own in kept}))
    return lines


def cells_won(tables: Mapping[str, Lines], method: str = "eps") -> tuple[int, int, list[str]]:
    """Cells (task and column) where a method is best at any number of evaluations; how many there are; the others."""
    won, count, lost = 0, 0, []
    for task, lines in tables.items():
        for column, (_, larger) in METRICS.items():
            found = [(values[column], name, nfe) for name, nfe, values in lines if column in values]
            if len({name for _, name, _ in found}) < 2:
                continue
            best = (max if larger else min)(value for value, _, _ in found)
            winners = {name for value, name, _ in found if value == best}
            count += 1
            won += method in winners
            if method not in winners:
                lost.append(f"{task} {column}: {', '.join(sorted(winners))}")
    return won, count, lost


def wins(evidence: Evidence) -> Finding:
    """Rule: over the tasks and columns that the paper's tables have too, EPS at some number of evaluations is best in
    at least as large a share of the cells as in the paper's tables (half of them where no paper is given). Every method
    of the rows takes part; distances between sets compare only the largest sets. No interval: ties are won."""
    theirs = cells_won(evidence.paper_tables)
    tables = {t: our_table(evidence, t) for t, name in evidence.tasks.items() if name}
    won, count, lost = cells_won({t: v for t, v in tables.items() if any(m == "eps" for m, _, _ in v)})
    paper = f"best in {theirs[0]} of {theirs[1]} cells; not in {'; '.join(theirs[2])}" if theirs[1] else ""
    if not count or all(len({m for m, _, _ in v}) < 2 for v in tables.values()):
        return Finding([], paper)
    wanted = theirs[0] / theirs[1] if theirs[1] else 0.5
    text = f"best in {won} of {count} cells ({won / count:.0%}, wanted {wanted:.0%})"
    note = f"Not in: {'; '.join(lost)}." if lost else ""
    return Finding([Part("all cells", "holds" if won / count >= wanted else "does not hold", text)], paper, note)


def order(evidence: Evidence) -> Finding:
    """Rule: for every task and column of the paper's tables, the methods that both have (training-free ones, Palette,
    EPS, at the paper's number of evaluations where it was measured) are ranked, and Kendall's tau is taken between the
    two rankings. Holds when tau is at least 0.5 on average over a task's columns, in every task; cells need 5 methods.
    """
    parts = []
    for task, name in evidence.tasks.items():
        theirs = {(m, n): v for m, n, v in evidence.paper_lines(name)}
        if not theirs:
            continue
        ours = our_table(evidence, task)
        taus = []
        for column in METRICS:
            pairs = []
            for (method, nfe), values in theirs.items():
                found = {n: v[column] for m, n, v in ours if m == method and column in v}
                chosen = nfe if nfe in found else next(iter(found), None) if method not in TRAINED else None
                if chosen is not None and column in values:
                    pairs.append((values[column], found[chosen]))
            if len(pairs) >= 5:
                taus.append(float(kendalltau(*zip(*pairs, strict=True)).statistic))
        if taus:
            mean = float(np.mean(taus))
            text = f"tau {mean:.2f} on average, {min(taus):.2f} to {max(taus):.2f} over {len(taus)} columns"
            parts.append(Part(task, "holds" if mean >= 0.5 else "does not hold", text))
    return Finding(parts, f"order of the tables of {evidence.paper_set}" if parts else "")


def palette(evidence: Evidence) -> Finding:
    """Rule: at equal numbers of evaluations (100, and 20 where both were measured), with the same network and training,
    the CRPS of EPS over Palette's is below 1: paired bootstrap over images, every task."""
    parts = []
    for task in evidence.tasks:
        for nfe in (20, 100):
            found = ratio(*(evidence.values(task, m, nfe, "crps") for m in ("eps", "palette")))
            if found:
                parts.append(Part(f"{task}, {nfe} evaluations", below(found, 1.0), f"CRPS ratio {found.text()}"))
    table = evidence.paper_tables
    theirs = {t: {(m, n): v["crps_pixel"] for m, n, v in lines} for t, lines in table.items()}
    cells = {
        t: (v[("eps", 100)], v[("palette", 100)]) for t, v in theirs.items() if {("eps", 100), ("palette", 100)} <= {*v}
    }
    worse = [f"{t} {e:g} against {p:g}" for t, (e, p) in cells.items() if e > p]
    paper = f"CRPS lower in {len(cells) - len(worse)} of {len(cells)} tasks" if cells else ""
    return Finding(parts, paper + (f"; its own tables contradict it: {'; '.join(worse)}" if worse else ""))


def _rivals(evidence: Evidence, task: str) -> list[tuple[str, int]]:
    return [(m, n) for m, n in evidence.lines(task) if m.partition("-")[0] not in TRAINED]


def _over_rivals(evidence: Evidence, task: str) -> tuple[list[Part], Interval | None]:
    """EPS's CRPS over that of every training-free method; the ratio to the best of them."""
    nfe = evidence.nfe(task, "eps")
    own = evidence.values(task, "eps", nfe, "crps")
    found = {(m, n): ratio(own, evidence.values(task, m, n, "crps")) for m, n in _rivals(evidence, task)}
    measured = {k: v for k, v in found.items() if v is not None}
    parts = [
        Part(f"{task}, {nfe} against {m} at {n}", below(v, 1.0), f"CRPS ratio {v.text()}")
        for (m, n), v in sorted(measured.items(), key=lambda item: -item[1].value)
    ]
    return parts, max(measured.values(), key=lambda v: v.value, default=None)


def approximations(evidence: Evidence) -> Finding:
    """Rule: in every task that the paper has, the CRPS of EPS at 20 evaluations (or the nearest measured) over that of
    every training-free method of the rows, classical ones included, is below 1: paired bootstrap over images."""
    parts = [p for task, name in evidence.tasks.items() if name for p in _over_rivals(evidence, task)[0]]
    lost, count = [], 0
    for task, lines in evidence.paper_tables.items():
        own = min((v["crps_pixel"] for m, n, v in lines if (m, n) == ("eps", 20)), default=math.nan)
        rivals = [(v["crps_pixel"], m) for m, _, v in lines if m not in TRAINED]
        count += len(rivals)
        lost += [f"{task} {own:g} against {m} {v:g}" for v, m in rivals if not own < v]
    paper = f"CRPS at 20 lower in {count - len(lost)} of {count} comparisons" if count else ""
    return Finding(parts, paper + (f"; its own tables contradict it: {'; '.join(lost)}" if lost else ""))


def extreme(evidence: Evidence) -> Finding:
    """Rule: with 95 % of the pixels missing and for averages of 16x16, the CRPS of EPS at 20 evaluations (or the
    nearest measured) over that of every training-free method is below 1, paired bootstrap over images; and its pooled
    whitened residual is between 0.9 and 1.1, where copying noise or ignoring the measurement would show."""
    parts, notes = [], []
    for task, usual in EXTREME.items():
        found, best = _over_rivals(evidence, task)
        parts += found
        residual = _residual(evidence, task)
        if residual:
            parts.append(Part(f"{task}, residual", within(residual, 0.9, 1.1), f"whitened residual {residual.text()}"))
        before = _over_rivals(evidence, usual)[1] if best else None
        if best and before:
            notes.append(f"{task}: CRPS over that of the best rival {best.text()}; {usual}: {before.text()}")
    return Finding(parts, note=". ".join(notes))


def _residual(evidence: Evidence, task: str) -> Interval | None:
    nfe = evidence.nfe(task, "eps")
    found = ratio(*(evidence.values(task, "eps", nfe, c) for c in ("residual", "measurements")))
    return found and Interval(math.sqrt(found.value), math.sqrt(found.low), math.sqrt(found.high), found.images)


def one_evaluation(evidence: Evidence) -> Finding:
    """Rule: no estimator has a smaller expected squared error than the posterior mean. So in every task the pooled
    squared error of every other line (one sample, a point estimate, the mean of a method's samples) over that of one
    evaluation of EPS is at least 0.97; 3 % are allowed because the mean is a trained network's. Paired bootstrap over
    images; each task is judged by its smallest ratio."""
    parts = []
    for task in evidence.tasks:
        own, psnr = evidence.of_mean(task), evidence.of_mean(task, "psnr")
        found = []
        for method, nfe in evidence.lines(task):
            for column, what in (("mse", ""), ("mse_mean", "mean of samples of ")):
                if (method, nfe, what) == ("eps", 1, ""):
                    continue
                interval = ratio(evidence.values(task, method, nfe, column), own)
                if interval and math.isfinite(interval.value):
                    found.append((interval.value, f"{what}{method} at {nfe}", interval, (method, nfe, column)))
        if found:
            _, name, interval, (method, nfe, column) = min(found, key=lambda f: f[0])
            other = evidence.values(task, method, nfe, column.replace("mse", "psnr"))
            common = [i for i in other if i in psnr]
            text = f"nearest is {name}: squared error ratio {interval.text()}"
            if common:
                text += f", PSNR {_mean(psnr, common):.2f} dB against {_mean(other, common):.2f} dB"
            parts.append(Part(task, above(interval, 0.97), text))
    wrong, tasks = [], evidence.paper_tables
    for task, lines in tasks.items():
        own_paper = max((v["psnr"] for m, n, v in lines if (m, n) == ("eps", 1)), default=math.nan)
        best, m, n = max((v["psnr"], m, n) for m, n, v in lines if (m, n) != ("eps", 1))
        if best > own_paper:
            wrong.append(f"{task}: {own_paper:g} dB at 1 against {best:g} dB of {m} at {n}")
    paper = f"PSNR of 1 NFE highest in {len(tasks) - len(wrong)} of {len(tasks)} tasks" if tasks else ""
    return Finding(parts, paper + (f"; its own tables contradict it, {'; '.join(wrong)}" if wrong else ""))


def _mean(values: Mapping[int, float], images: Sequence[int]) -> float:
    return float(np.mean([values[i] for i in images]))


def many_samples(evidence: Evidence) -> Finding:
    """Rule: the mean of n posterior samples has 1 + 1/n times the squared error of the posterior mean. For the line of
    EPS with the most samples in every task (on 16 images at least, where there is one), the ratio of pooled squared
    errors is between 0.95 and 1.1 (1 + 1/n): paired bootstrap over images. Below, one evaluation is not the mean of
    what is sampled; above, samples are off."""
    parts = []
    for task in evidence.tasks:
        known = []
        for method, nfe in evidence.lines(task):
            counts = {r["samples"] for r in evidence.groups[task, method, nfe]} if method in ("eps", "eps-many") else ()
            for count in counts:
                means = evidence.values(task, method, nfe, "mse_mean", count)
                if found := ratio(means, evidence.of_mean(task)):
                    known.append((len(means) >= 16, count, -nfe, found))
        if known:
            _, count, nfe, found = max(known, key=lambda k: k[:3])
            due = 1 + 1 / count
            text = f"mean of {count} samples at {-nfe}, {found.images} images: squared error ratio {found.text()}"
            parts.append(Part(task, within(found, 0.95, 1.1 * due), f"{text}, due {due:.3f}"))
    return Finding(parts)


def calibrated(evidence: Evidence) -> Finding:
    """Rule: samples are of the posterior: in every task, at 20 evaluations (or the nearest measured), the pooled
    whitened residual of one sample is within 0.9 to 1.1 (due: 1) and its pooled squared error over that of one
    evaluation within 1.7 to 2.3 (due: 2). Bootstrap over images."""
    parts = []
    for task in evidence.tasks:
        nfe = evidence.nfe(task, "eps")
        if residual := _residual(evidence, task):
            parts.append(Part(f"{task}, residual", within(residual, 0.9, 1.1), f"{residual.text()} at {nfe}"))
        if found := ratio(evidence.values(task, "eps", nfe, "mse"), evidence.of_mean(task)):
            parts.append(Part(f"{task}, variety", within(found, 1.7, 2.3), f"MSE ratio {found.text()} at {nfe}"))
    shown = []
    for task, lines in evidence.paper_tables.items():
        psnr = {n: v["psnr"] for m, n, v in lines if m == "eps"}
        if {1, 20, 100} <= {*psnr}:
            ratios = [10 ** ((psnr[1] - psnr[n]) / 10) for n in (20, 100)]
            shown.append(f"{task} {ratios[0]:.2f} at 20, {ratios[1]:.2f} at 100")
    return Finding(parts, f"MSE ratios from its mean PSNRs (due: 2): {'; '.join(shown)}" if shown else "")


def training(evidence: Evidence) -> Finding:
    """Rule: the pretrained denoiser queried at the pivot is not enough: the CRPS of EPS at 20 evaluations (or the
    nearest measured) over that of the zero-shot pivot is below 1 in every task, paired bootstrap over images."""
    parts = []
    for task in evidence.tasks:
        nfe = evidence.nfe(task, "eps")
        for rival in evidence.nfes(task, "zero-shot-pivot"):
            found = ratio(
                evidence.values(task, "eps", nfe, "crps"), evidence.values(task, "zero-shot-pivot", rival, "crps")
            )
            if found:
                parts.append(Part(f"{task}, {nfe} against {rival}", below(found, 1.0), f"CRPS ratio {found.text()}"))
    return Finding(parts)


def zero_shot(evidence: Evidence) -> Finding:
    """Rule: without training the pivot is as good as the approximations: in every task that the paper has, the CRPS of
    the zero-shot pivot over that of the middle one of DPS, DAPS, DDNM, PiGDM and MPGD (ranked by CRPS, at least three
    measured) is at most 1, paired bootstrap over images."""
    parts = []
    for task, name in evidence.tasks.items():
        nfe = evidence.nfe(task, "zero-shot-pivot", 100)
        own = evidence.values(task, "zero-shot-pivot", nfe, "crps")
        lines = [(m, n, evidence.values(task, m, n, "crps")) for m, n in evidence.lines(task) if m in APPROXIMATIONS]
        found = sorted(
            (v.value, m, n, v) for m, n, values in lines if (v := ratio(own, values)) and not math.isnan(v.value)
        )
        if name and len(found) >= 3:
            _, m, n, middle = found[len(found) // 2]
            text = f"the middle one is {m} at {n}: CRPS ratio {middle.text()}"
            parts.append(Part(task, below(middle, 1.0), text))
    return Finding(parts)


MAIN = (
    "posteriori benchmark recipes/{run}-benchmark.yaml --set data=DATA --set models.base=BASE --set models.eps=EPS "
    "--set models.palette=PALETTE"
)
MANY = "posteriori benchmark recipes/{run}-claims.yaml --set data=DATA --set models.eps=EPS --set 'only=[eps-many]'"

CLAIMS = (
    Claim("best-cells", "EPS is best in nearly all cells of the main tables", wins, MAIN),
    Claim("order", "The methods stand in the order of the paper's tables", order, MAIN),
    Claim("over-palette", "At equal training and evaluations EPS beats Palette (CRPS)", palette, MAIN),
    Claim("over-approximations", "EPS beats every training-free method (CRPS)", approximations, MAIN),
    Claim("extreme", "EPS stays best, and consistent with y, under extreme degradation", extreme, MAIN),
    Claim("one-evaluation", "One evaluation is the MMSE estimate, of the smallest squared error", one_evaluation, MAIN),
    Claim("mean-of-many", "The mean of many samples is the estimate of one evaluation", many_samples, MANY),
    Claim("calibrated", "Samples are posterior samples: residual 1, twice the mean's squared error", calibrated, MAIN),
    Claim("training-needed", "The zero-shot pivot is not enough, training at the pivot is", training, MAIN),
    Claim("zero-shot", "Without training, the pivot is as good as the approximations", zero_shot, MAIN),
)  # fmt: skip
