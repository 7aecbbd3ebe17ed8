"""The bench of iterative solves at a tiny size: its truth is the truth, its bounds hold, and it would tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posteriori.bench import cg_error
from posteriori.operators import KrylovOperator, Matrix
from posteriori.pivot import pivot
from posteriori.solve import Solution


def test_truth_is_that_of_the_exact_solve() -> None:
    """Every figure is a distance from this truth: the pivot by the SVD of the same matrix, and its whitened error."""
    make, shape = next(v for k, v in cg_error.operators(16).items() if k.startswith("CT"))
    truth = cg_error.Truth(make(), shape)
    A = Matrix(truth.matrix, shape)
    x, e = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = A(x)
    exact = pivot(x, y, A, alpha_t=1.0, sigma_t=2.0, sigma_y=0.1)
    a, b = 0.01, 4.0
    found = truth.solve(a, b, a * x.flatten() + b * truth.matrix.T @ y.flatten())
    torch.testing.assert_close(found, exact.flatten(), rtol=1e-8, atol=1e-8)
    whitened = ((e / 2).square().sum() + (A(e) / 0.1).square().sum()).div(e.numel()).sqrt()
    assert truth.whitened(e, a, b) == pytest.approx(float(whitened), rel=1e-8)
    torch.testing.assert_close(
        truth.function(lambda lam: torch.rsqrt(1 + lam), x), A.spectral(lambda lam: torch.rsqrt(1 + lam), x)
    )


def test_command_measures_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bound below the error would end the command as if nothing were wrong."""
    out = tmp_path / "rows.jsonl"
    assert cg_error.main(["--size", "12", "--operators", "MRI", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    errors = [r for r in rows if "bound" in r]
    assert len(errors) == len(cg_error.SIGMA_T) * len(cg_error.SIGMA_Y)
    assert len(rows) == len(errors) + len(cg_error.SIGMA_T)
    assert all(r["error"] <= 1.01 * r["bound"] + cg_error.ROUNDING for r in errors)
    assert "| MRI, 4 coils" in capsys.readouterr().out

    solve = KrylovOperator.solve

    def boastful(self: KrylovOperator, *args: Any, **kwargs: Any) -> Solution:
        solution = solve(self, *args, **kwargs)
        return replace(solution, bound=solution.bound / 100)

    monkeypatch.setattr(KrylovOperator, "solve", boastful)
    assert cg_error.main(["--size", "12", "--operators", "MRI"]) == 1
