"""The comparison of solves: what it measures, on small images (needs deepinv, but for the table)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posteriori.bench import solve_speed
from posteriori.operators import Matrix


def dense_case() -> solve_speed.Case:
    matrix = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return solve_speed.Case("dense", None, Matrix(matrix), (8,), True)


def test_the_reference_and_the_error_are_numpys() -> None:
    """The table would judge both libraries by a wrong ruler (dense linear algebra, float64, 1e-6)."""
    case = dense_case()
    p = solve_speed.problem(case, 2, sigma_t=3.0)
    assert p.certificate < 1e-6
    m = case.ours.matrix.double().numpy()  # type: ignore[attr-defined]
    precision = np.eye(8) / 9 + m.T @ m / solve_speed.SIGMA_Y**2
    for i in range(2):
        h = p.x_t[i].double().numpy() / 9 + m.T @ p.y[i].double().numpy() / solve_speed.SIGMA_Y**2
        np.testing.assert_allclose(p.exact[i].numpy(), np.linalg.solve(precision, h), rtol=1e-6)
    e = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).double()
    expected = max(np.sqrt(v @ precision @ v / 8) for v in e.numpy())
    assert solve_speed.whitened_error(case.ours, p, p.exact + e) == pytest.approx(expected)


def test_deepinv_gets_as_many_iterations_as_it_needs(deepinv: Any) -> None:
    """A peer stopped early looks fast and wrong, one that runs on looks slow."""
    case = dense_case()
    matrix = case.ours.matrix  # type: ignore[attr-defined]
    physics = deepinv.physics.LinearPhysics(A=lambda x, **_: x @ matrix.T, A_adjoint=lambda y, **_: y @ matrix)
    case = solve_speed.Case("dense", physics, case.ours, (8,), True)
    p = solve_speed.problem(case, 1, sigma_t=3.0)
    options = solve_speed.tune(case, p, 1e-3, seconds=5.0)
    assert solve_speed.whitened_error(case.ours, p, solve_speed.theirs(case, p, options)) <= 1e-3
    assert options["max_iter"] <= 20  # 6 singular values
    row = solve_speed.compare(case, 1, 3.0, 3, options)
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]


@pytest.mark.slow
def test_the_command_measures_once(deepinv: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupted comparison would start anew, or mix up operators; memory that grows like n^2 would not be seen."""
    out = tmp_path / "rows.jsonl"
    arguments = ["--size", "64", "--batches", "1", "--turns", "2", "--seconds", "0.05", "--out", str(out)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert solve_speed.main([*arguments, "--operators", "x4"]) == 0
        before = out.read_bytes()
        assert solve_speed.main([*arguments, "--operators", "x4"]) == 0
    assert out.read_bytes() == before
    rows = [json.loads(line) for line in before.decode().splitlines()]
    solves = [r for r in rows if r["kind"] == "solve"]
    assert {(r["operator"], r["sigma_t"]) for r in solves} == {
        (name, s) for name in ("x4 box, circular", "x4 bicubic, reflect") for s in solve_speed.SIGMA_T
    }
    assert all(r["ours_error"] < 1e-2 and r["reference"] < 1e-4 for r in solves)
    small, large = (r["mib"] for r in rows if r["kind"] == "memory")
    for name in small.keys() & large.keys():
        if "dense" not in name:
            assert large[name] <= 4.5 * small[name], name  # four times the pixels; n^2 would be sixteen
    assert "share of network" in capsys.readouterr().out
