r"""Which times a sampler visits.

A posterior has nothing to decide at the highest noise: the first evaluation, there, gives its mean whatever ``x_t`` is,
and the next may be at ``q = start``, a few standard deviations ``s`` of the data: a warm start from the 1-NFE mean.
From there ``q^(1/rho)`` falls in equal steps to ``stop``, the last evaluation before noise 0. With ``n`` evaluations

    start = 5 n/8 max(s, w/2),      stop = s/100 max((8/n)^5, 8/n), at most s/5,      rho = 15:

the fewer there are, the smaller the range they can cover. ``w`` is the posterior's standard deviation in its widest
direction (:mod:`posteriori.width`), which a large hole in a photo makes far larger than ``s``. docs/sampler.md has the
measurements behind these numbers.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from posteriori.schedule import Schedule

Grid = Literal["posterior", "karras", "log", "uniform"]

__all__ = ["Grid", "time_grid"]

RHO = 15.0


def time_grid(
    schedule: Schedule,
    steps: int,
    grid: Grid | Tensor = "posterior",
    data_std: float = 0.5,
    *,
    width: float = 0.0,
    start: float | None = None,
    stop: float | None = None,
    rho: float | None = None,
) -> Tensor:
    """Decreasing times from the largest to 0, ``(steps + 1,)``, float64.

    Args:
        schedule: of the denoiser.
        steps: number of steps; all but the last of ``"posterior"`` lie between ``start`` and ``stop``.
        grid: ``"posterior"`` (module's head), a spacing of :meth:`Schedule.grid`, or the ``steps + 1`` times
            themselves, the last of them 0.
        data_std: root mean square of the data.
        width: standard deviation of the posterior in its widest direction, 0 where it is not known.
        start, stop: noise ``q = sigma_t/alpha_t`` of the second and of the last evaluation of ``"posterior"``, where
            they are to differ from the module's head.
        rho: exponent of ``"posterior"`` (15) and ``"karras"`` (7).

    Raises:
        ValueError: on an unknown grid, times that do not decrease to 0 or are not as many as the steps need, or
            ``start`` and ``stop`` in the wrong order or where they have no meaning.
    """
    if isinstance(grid, Tensor):
        times = grid.detach().to("cpu", torch.float64).reshape(-1)
        if len(times) != steps + 1 or not bool((times.diff() < 0).all()) or float(times[-1]) != 0:
            raise ValueError(f"a grid for this many evaluations is {steps + 1} decreasing times that end with 0")
        if not float(times[0]) <= schedule.t_max:
            raise ValueError(f"the grid starts at t = {float(times[0]):g}, the schedule ends at {schedule.t_max:g}")
        return times
    if grid not in get_args(Grid):
        raise ValueError(f"unknown grid {grid!r}: choose {', '.join(get_args(Grid))}, or give the times")
    if grid != "posterior":
        if start is not None or stop is not None:
            raise ValueError(f"start and stop belong to the grid 'posterior', not to {grid!r}")
        return schedule.grid(steps, grid, 7.0 if rho is None else rho)
    if steps < 1:
        raise ValueError(f"a time grid needs at least 1 step, got {steps}: ask for more evaluations")
    high, low = (float(q) for q in schedule.ratio(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)))
    first = min(max(0.625 * steps * max(data_std, width / 2), 4 * low), high / 2) if start is None else start
    scarce = 8 / steps
    last = min(max(min(0.01 * max(scarce**5, scarce), 0.2) * data_std, low), first) if stop is None else stop
    if not 0 < last <= first < high or (steps > 2 and last == first):
        raise ValueError(f"need 0 < stop < start < {high:g}, the largest noise, got start {first:g} and stop {last:g}")
    power = 1 / (RHO if rho is None else rho)
    # one step goes straight to 0, two by way of start
    x = torch.linspace(0, 1, max(steps - 1, 1), dtype=torch.float64)[: steps - 1]
    between = schedule.time((first**power + x * (last**power - first**power)) ** (1 / power))
    ends = torch.tensor([schedule.t_max, 0.0], dtype=torch.float64)
    return torch.cat([ends[:1], between, ends[1:]])
