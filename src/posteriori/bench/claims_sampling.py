"""Verdicts on sampling: evaluations, warm starts, solvers and interpolants, one network for all tasks."""

from __future__ import annotations

import numpy as np
import torch

from posteriori.bench.claims_common import (
    Claim,
    Evidence,
    Finding,
    Interval,
    Part,
    State,
    below,
    combine,
    frechet,
    ratio,
    within,
)

__all__ = ["CLAIMS", "PER_TASK", "frechet_ratio"]

SOLVERS = ("eps-heun", "eps-euler", "eps-ancestral", "eps-dpmpp")
SCHEDULES = ("eps-vp", "eps-flow", "eps-vp-ddim", "eps-flow-euler")
STARTS = ("eps-start-1", "eps-start-0.5", "eps-start-0.25")
# Networks trained for one kind of task, and the tasks they are measured on.
PER_TASK = {"eps-inpaint": ("random",), "eps-box": ("box",), "eps-sr": ("sr4",), "eps-gaussian": ("gaussian",),
            "eps-motion": ("motion",)}  # fmt: skip
GROUPS = 8  # of the jackknife


def _against(evidence: Evidence, task: str, method: str, nfe: int, other: str, other_nfe: int) -> Interval | None:
    return ratio(evidence.values(task, method, nfe, "crps"), evidence.values(task, other, other_nfe, "crps"))


def _plateau(ratios: dict[int, Interval], bound: float, unit: str) -> Part | None:
    """Of ratios to 100 evaluations by number of evaluations; judged from 20 on, where 20 is there."""
    if 20 not in ratios:
        return None
    state: State = combine(below(v, bound) for n, v in ratios.items() if n >= 20)
    start = 100
    for n in sorted(ratios, reverse=True):
        if ratios[n].value > bound:
            break
        start = n
    listed = ", ".join(f"{n}: {v.text()}" for n, v in sorted(ratios.items()))
    return Part("", state, f"within {bound - 1:.0%} from {start} on; {unit} over that of 100: {listed}")


def _paper_plateau(evidence: Evidence, column: str) -> str:
    found = []
    for task, lines in evidence.paper_tables.items():
        values = {n: v[column] for m, n, v in lines if m == "eps"}
        if {20, 100} <= {*values}:
            found.append((values[20] / values[100], task))
    return f"20 over 100: at most {max(found)[0]:.3f} ({max(found)[1]}), {len(found)} tasks" if found else ""


def plateau_crps(evidence: Evidence) -> Finding:
    """Rule: from 20 evaluations on nothing is gained: in every task where EPS was measured at 20 and 100, its CRPS at
    20 and at every higher number measured is at most 1.03 times that at 100. Paired bootstrap over images."""
    parts = []
    for task in evidence.tasks:
        at = {n: _against(evidence, task, "eps", n, "eps", 100) for n in evidence.nfes(task, "eps") if 1 < n < 100}
        part = _plateau({n: v for n, v in at.items() if v}, 1.03, "CRPS")
        parts += [Part(task, part.state, part.text)] if part else []
    return Finding(parts, _paper_plateau(evidence, "crps_pixel"))


def frechet_ratio(evidence: Evidence, task: str, nfe: int, other: int, method: str = "eps") -> Interval | None:
    """Frechet distance at one number of evaluations over that at another, on the images that both have.

    The interval is two standard errors wide to either side, by a jackknife over groups of images.
    """
    one, two = (evidence.feature_pairs(task, method, n) for n in (nfe, other))
    common = sorted(set(one) & set(two))
    if not evidence.enough(common):
        return None
    drawn = [torch.from_numpy(np.stack([p[i][0] for i in common])) for p in (one, two)]
    true = torch.from_numpy(np.stack([one[i][1] for i in common]))

    def value(keep: np.ndarray) -> float:
        kept = torch.from_numpy(keep)
        top, bottom = (frechet(true[kept], d[kept]) for d in drawn)
        return top / bottom

    place = np.arange(len(common)) % GROUPS
    left = [value(place != g) for g in range(GROUPS)]
    error = 2 * float(np.sqrt((GROUPS - 1) * np.var(left)))
    whole = value(place >= 0)
    return Interval(whole, whole - error, whole + error, len(common))


def plateau_frechet(evidence: Evidence) -> Finding:
    """Rule: as plateau-crps for the Frechet distance of features of one sample to those of the true images, on the
    images that both numbers of evaluations have, 50 at least: at most 1.05 times that at 100. Jackknife over 8 groups
    of images, two standard errors."""
    parts = []
    for task in evidence.tasks:
        at = {n: frechet_ratio(evidence, task, n, 100) for n in evidence.nfes(task, "eps") if 1 < n < 100}
        part = _plateau({n: v for n, v in at.items() if v}, 1.05, "Frechet distance")
        parts += [Part(task, part.state, part.text)] if part else []
    return Finding(parts, _paper_plateau(evidence, "fid"))


def warm_start(evidence: Evidence) -> Finding:
    """Rule: 8 evaluations that go from the mean of the first one straight to a noise of 5 standard deviations of the
    data (the default grid) are worth 20 that walk down from the largest noise (eps-cold, Karras' grid, same solver):
    CRPS ratio at most 1.03 in every task; and better than 8 that walk: ratio below 1. Paired bootstrap over images.
    Starts at lower noise still (eps-start-Q) are listed, not judged."""
    parts, notes = [], []
    for task in evidence.tasks:
        for nfe, bound in ((20, 1.03), (8, 1.0)):
            found = _against(evidence, task, "eps", 8, "eps-cold", nfe)
            if found:
                text = f"CRPS ratio {found.text()}"
                parts.append(Part(f"{task}, 8 warm against {nfe} cold", below(found, bound), text))
        lower = {m: _against(evidence, task, m, 8, "eps", 8) for m in STARTS}
        shown = [f"{m.removeprefix('eps-start-')}: {v.text()}" for m, v in lower.items() if v]
        notes += [f"{task}, CRPS of 8 from lower noise over the default's: {', '.join(shown)}"] if shown else []
    return Finding(parts, note=". ".join(notes))


def any_solver(evidence: Evidence) -> Finding:
    """Rule: the backbone's own sampler runs unchanged: in every task, at 20 evaluations, the CRPS of Heun, Euler (DDIM
    without fresh noise), ancestral sampling (DDIM with it) and DPM-Solver++, all on Karras' grid, over that of the
    default sampler at 100 is at most 1.1, and at 50 at most 1.05. Paired bootstrap over images; 8 evaluations are
    listed, not judged."""
    parts, notes = [], []
    for task in evidence.tasks:
        for method in SOLVERS:
            for nfe, bound in ((20, 1.1), (50, 1.05)):
                found = _against(evidence, task, method, nfe, "eps", 100)
                if found:
                    text = f"CRPS over that of the default at 100: {found.text()}"
                    parts.append(Part(f"{task}, {method} at {nfe}", below(found, bound), text))
        few = {m: _against(evidence, task, m, 8, "eps", 100) for m in ("eps", *SOLVERS)}
        shown = [f"{m} {v.text()}" for m, v in few.items() if v]
        notes += [f"{task}, 8 evaluations over the default's 100: {', '.join(shown)}"] if len(shown) > 1 else []
    return Finding(parts, note=". ".join(notes))


def any_schedule(evidence: Evidence) -> Finding:
    """Rule: in (u, q) all interpolants are one, so the network samples as a VP or flow model too: in every task, at 20
    evaluations, the CRPS with the default sampler on VP and on rectified flow is within 3 % of that on the network's
    own schedule, and that of their usual samplers (DDIM without fresh noise and Euler, evenly spaced in time) at most
    1.1 of it. Paired bootstrap over images."""
    parts = []
    for task in evidence.tasks:
        for method in SCHEDULES:
            found = _against(evidence, task, method, 20, "eps", 20)
            if found:
                usual = method.count("-") > 1
                state = below(found, 1.1) if usual else within(found, 0.97, 1.03)
                parts.append(Part(f"{task}, {method}", state, f"CRPS over that on the own schedule: {found.text()}"))
    return Finding(parts)


def amortized(evidence: Evidence) -> Finding:
    """Rule: one network for all tasks loses little to networks trained for one task, as long and from the same weights:
    on that task, CRPS at 20 evaluations and squared error of one evaluation are at most 1.05 times those of the network
    of its own. Paired bootstrap over images."""
    parts = []
    for method, tasks in PER_TASK.items():
        for task in tasks:
            for what, found in (
                ("CRPS at 20", _against(evidence, task, "eps", 20, method, 20)),
                ("squared error of one", ratio(evidence.of_mean(task), evidence.of_mean(task, method=method))),
            ):
                if found:
                    text = f"{what}: amortized over per-task {found.text()}"
                    parts.append(Part(f"{task}, {what}", below(found, 1.05), text))
    return Finding(parts)


CURVES = "posteriori benchmark recipes/{run}-claims-curves.yaml --set data=DATA --set models.eps=EPS"
SAMPLERS = "posteriori benchmark recipes/{run}-claims.yaml --set data=DATA --set models.eps=EPS"
TASKS = (
    "posteriori benchmark recipes/{run}-claims-per-task.yaml --set data=DATA --set models.eps-sr=EPS_SR "
    "--set models.eps-inpaint=EPS_INPAINT"
)

CLAIMS = (
    Claim("plateau-crps", "20 evaluations are as good as 100 (CRPS)", plateau_crps, CURVES),
    Claim("plateau-frechet", "20 evaluations are as good as 100 (Frechet distance)", plateau_frechet, CURVES),
    Claim("warm-start", "Starting from the 1-NFE mean at a lower noise saves evaluations", warm_start, SAMPLERS),
    Claim("any-solver", "The sampler of the backbone runs unchanged, whichever it is", any_solver, SAMPLERS),
    Claim("any-schedule", "The interpolant does not matter: VE, VP and flow", any_schedule, SAMPLERS),
    Claim("amortized", "One network for all tasks is as good as one for each", amortized, TASKS),
)
