"""Schedules against numerical integration, published formulas, and their own inverses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from posteriori.schedule import VE, VP, CosineVP, DiscreteVP, RectifiedFlow, Schedule, schedule_from_config

F64 = torch.float64
TABLE = tuple(torch.linspace(1e-4, 0.02, 1000, dtype=F64).neg().add(1).cumprod(0).tolist())
SCHEDULES = [
    VE(),
    VE(0.01, 10.0),
    VP(),
    VP(0.0, 5.0, 1e-3),
    CosineVP(),
    CosineVP(0.0, 1e-3, 0.9),
    DiscreteVP(TABLE),
    DiscreteVP((0.99, 0.5, 0.3, 0.01), 0.9),
    RectifiedFlow(),
    RectifiedFlow(0.02, 0.9),
]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: str(s)[:40])


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


@each_schedule
@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1))
def test_time_inverts_ratio(schedule: Schedule, share: float) -> None:
    """The sampler would tell the denoiser a noise that the state does not have (relative error 1e-9 in q)."""
    t = tensor(schedule.t_min + share * (schedule.t_max - schedule.t_min))
    q = schedule.ratio(t)
    torch.testing.assert_close(schedule.ratio(schedule.time(q)), q, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.time(q), t, rtol=1e-8, atol=1e-12)


@each_schedule
def test_noise_grows(schedule: Schedule) -> None:
    """A grid would step back into the noise."""
    t = torch.linspace(schedule.t_min, schedule.t_max, 400, dtype=F64)
    assert bool((schedule.ratio(t).diff() > 0).all())
    assert bool((schedule.sigma(t).diff() > 0).all())
    assert bool((schedule.alpha(t).diff() <= 0).all())
    assert bool((schedule.alpha(t) > 0).all())


@each_schedule
def test_no_noise_at_time_0(schedule: Schedule) -> None:
    """Samples would keep noise, or start from data scaled by something else than 1; in either precision."""
    for dtype in (torch.float32, F64):
        zero = torch.zeros(1, dtype=dtype)
        assert schedule.alpha(zero).item() == 1
        assert schedule.sigma(zero).item() == 0
        assert schedule.ratio(zero).item() == 0


@each_schedule
def test_ratio_is_sigma_over_alpha(schedule: Schedule) -> None:
    """Two formulas for one thing that disagree (float64, relative 1e-9)."""
    t = torch.linspace(schedule.t_min, schedule.t_max, 50, dtype=F64)
    torch.testing.assert_close(schedule.ratio(t), schedule.sigma(t) / schedule.alpha(t), rtol=1e-9, atol=0)


@each_schedule
def test_single_precision_is_accurate(schedule: Schedule) -> None:
    """Cancellation near t = 0 would give a network in float32 another noise than the state has (relative 1e-4)."""
    t = torch.linspace(schedule.t_min, schedule.t_max, 50, dtype=torch.float32)
    torch.testing.assert_close(schedule.ratio(t).double(), schedule.ratio(t.double()), rtol=1e-4, atol=0)
    torch.testing.assert_close(schedule.sigma(t).double(), schedule.sigma(t.double()), rtol=1e-4, atol=0)


@each_schedule
@pytest.mark.parametrize("spacing", ["karras", "log", "uniform"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_grids(schedule: Schedule, spacing: str, steps: int) -> None:
    """A grid that does not begin at all noise, end at none, or fall in between."""
    grid = schedule.grid(steps, spacing)  # type: ignore[arg-type]
    assert grid.dtype == F64
    assert grid.shape == (steps + 1,)
    assert float(grid[0]) == schedule.t_max
    assert float(grid[-1]) == 0
    assert bool((grid.diff() < 0).all())
    if steps > 1:
        assert math.isclose(float(grid[-2]), schedule.t_min, rel_tol=1e-8)


@pytest.mark.parametrize("steps", [2, 5, 18, 40])
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_edm_grid_is_karras(steps: int, rho: float) -> None:
    """Not the published grid: Karras et al. 2022, eq. 5, with sigma_min 0.002 and sigma_max 80."""
    i = np.arange(steps)
    expected = (80 ** (1 / rho) + i / (steps - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    np.testing.assert_allclose(VE().grid(steps, "karras", rho).numpy(), [*expected, 0], rtol=1e-12)


@each_schedule
def test_spacings_are_what_they_say(schedule: Schedule) -> None:
    """Uniform in q^(1/rho), in log q, and in t (second differences relative to the first)."""
    for spacing, scale in [("karras", lambda q: q ** (1 / 7)), ("log", torch.log)]:
        v = scale(schedule.ratio(schedule.grid(20, spacing)[:-1]))  # type: ignore[arg-type]
        torch.testing.assert_close(v.diff(), v.diff().mean().expand(19), rtol=1e-6, atol=1e-9)
    t = schedule.grid(20, "uniform")[:-1]
    torch.testing.assert_close(t.diff(), t.diff().mean().expand(19), rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if isinstance(s, VP | CosineVP)], ids=str)
def test_variance_is_preserved(schedule: Schedule) -> None:
    """Networks trained on unit variance would get another (1e-12)."""
    t = torch.linspace(0, schedule.t_max, 100, dtype=F64)
    total = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
    torch.testing.assert_close(total, torch.ones_like(t), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("beta_min", "beta_max"), [(0.1, 20.0), (0.5, 3.0)])
def test_vp_integrates_its_rate(beta_min: float, beta_max: float) -> None:
    """Not the VP process: alpha is exp(-1/2 integral of beta), here by quadrature (1e-10)."""
    schedule = VP(beta_min, beta_max)
    for t in (1e-4, 0.1, 0.5, 1.0):
        integral, _ = integrate.quad(lambda s: beta_min + s * (beta_max - beta_min), 0, t)
        assert math.isclose(float(schedule.alpha(tensor(t))), math.exp(-0.5 * integral), rel_tol=1e-10)
        assert math.isclose(float(schedule.sigma(tensor(t))), math.sqrt(1 - math.exp(-integral)), rel_tol=1e-9)


def test_vp_is_near_ddpm() -> None:
    """DDPM's 1000 steps approximate it at t = (i + 1) / 1000, as the class says: alpha within 0.005, and within 5 %
    up to step 900."""
    alphas = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    t = (torch.arange(1000, dtype=F64) + 1) / 1000
    np.testing.assert_allclose(VP().alpha(t).numpy()[:900], alphas[:900], rtol=0.05)
    np.testing.assert_allclose(VP().alpha(t).numpy(), alphas, atol=0.005)


def test_cosine_is_nichol_and_dhariwal() -> None:
    """Not the published schedule: alpha-bar = f(t)/f(0), f(t) = cos^2((t + s)/(1 + s) pi/2) (eq. 17; 1e-12)."""
    t = np.linspace(0, 0.992, 50)

    def f(t: np.ndarray) -> np.ndarray:
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

    np.testing.assert_allclose(CosineVP().alpha(torch.from_numpy(t)).numpy() ** 2, f(t) / f(np.zeros(1)), atol=1e-12)


def test_flow_is_the_straight_line() -> None:
    """x_t must lie on the segment between data and noise."""
    t = torch.linspace(0, 1, 11, dtype=F64)
    torch.testing.assert_close(RectifiedFlow().alpha(t) + RectifiedFlow().sigma(t), torch.ones_like(t))
    torch.testing.assert_close(RectifiedFlow().sigma(t), t)


@each_schedule
def test_config_round_trip(schedule: Schedule) -> None:
    """A saved model would be sampled on another schedule than it was trained on."""
    assert schedule_from_config(schedule.config()) == schedule


def test_times_of_any_shape() -> None:
    """One time for each sample: the shape is kept, and every entry is independent."""
    t = torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=F64) * 0.8 + 0.1
    for schedule in (VE(), VP(), CosineVP(), RectifiedFlow()):
        for function in (schedule.alpha, schedule.sigma, schedule.ratio, schedule.time):
            value = function(t)
            assert value.shape == (2, 3)
            torch.testing.assert_close(value[1, 2], function(t[1, 2]), rtol=1e-12, atol=1e-15)


def test_errors() -> None:
    """Each would give a grid of NaN, or a run that ends in one."""
    with pytest.raises(ValueError, match="at least 1 step"):
        VE().grid(0)
    with pytest.raises(ValueError, match="unknown spacing 'cosine'"):
        VE().grid(5, "cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown schedule 'DDPM'"):
        schedule_from_config({"kind": "DDPM"})
    with pytest.raises(ValueError, match="unknown schedule None"):
        schedule_from_config({})
    with pytest.raises(ValueError, match="bad parameters for schedule VE"):
        schedule_from_config({"kind": "VE", "beta_min": 0.1})
    for make in (
        lambda: VE(0.0, 1.0),
        lambda: VE(2.0, 1.0),
        lambda: VE(float("nan"), 1.0),
        lambda: VP(start=0.0),
        lambda: VP(beta_min=3.0, beta_max=1.0),
        lambda: CosineVP(stop=1.0),
        lambda: RectifiedFlow(stop=1.0),
        lambda: RectifiedFlow(start=0.0),
    ):
        with pytest.raises(ValueError, match="need 0 <"):
            make()


def test_a_table_of_steps() -> None:
    """A model would be asked at another noise than its step has; the table, and diffusers between steps, know."""
    from diffusers import EulerDiscreteScheduler

    schedule = DiscreteVP(TABLE)
    steps = torch.tensor([0, 1, 500, 998, 999])
    a = torch.tensor(TABLE, dtype=F64)[steps]
    t = (steps.double() + 1) / 1000
    torch.testing.assert_close(schedule.alpha(t), a.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.sigma(t), (1 - a).sqrt(), rtol=1e-9, atol=0)
    assert (schedule.t_min, schedule.t_max) == (1e-3, 1.0)
    table = torch.tensor(TABLE, dtype=F64)
    logs = ((1 - table) / table).sqrt().log().numpy()
    for q in (0.0123, 0.7, 31.4):
        expected = EulerDiscreteScheduler()._sigma_to_t(np.array([q]), logs)
        np.testing.assert_allclose(1000 * float(schedule.time(tensor(q))[0]) - 1, expected, rtol=1e-9)


@pytest.mark.parametrize("table", [(), (0.5,), (0.5, 0.5), (0.5, 0.6), (1.0, 0.5), (0.5, 0.0), (0.5, math.nan)])
def test_tables_that_are_none(table: tuple[float, ...]) -> None:
    """Noise that falls or is infinite would be divided by."""
    with pytest.raises(ValueError, match="alphas_cumprod"):
        DiscreteVP(table)
    with pytest.raises(ValueError, match="stop"):
        DiscreteVP(TABLE, 1.5)
