"""``posteriori check``: what it prints, and from what it takes an operator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posteriori import cli
from posteriori.checks import inspect_operator
from posteriori.loading import OperatorError, load_operator
from posteriori.operators import Callable, Identity, Matrix

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from helper import scale
import posteriori as po

def function(shape):
    return po.operators.Callable(lambda x: scale * x, shape=shape)

def plain():
    return po.operators.Identity()

class Named(po.operators.Matrix):
    def __init__(self):
        super().__init__(torch.eye(3)[:2])

@dataclass
class Pair:
    shape: tuple[int, ...]
    def forward(self, x):
        return x[..., ::2]
    def adjoint(self, y):
        back = y.new_zeros(y.shape[0], *self.shape)
        back[..., ::2] = y
        return back

instance = po.operators.Identity()
array = np.eye(3)[:2]
sparse = scipy.sparse.eye_array(3, format="csr")
linear = scipy.sparse.linalg.aslinearoperator(np.eye(48))
wrong = po.operators.Callable(lambda x: x.cumsum(-1), lambda y: 1.01 * y, shape=(5,))
text = "no operator"
def nothing(shape): return None
def fails(shape): raise RuntimeError("no such lens")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("scale = 2.0\n")
    path = tmp_path / "operators_of_mine.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("name", "shape"),
    [("function", (3, 4, 4)), ("plain", (3, 4, 4)), ("Named", (3,)), ("Pair", (3, 4, 4)), ("instance", (3, 4, 4)),
     ("array", (3,)), ("sparse", (3,)), ("linear", (3, 4, 4))],
)  # fmt: skip
def test_all_that_an_operator_may_be(
    source: Path, name: str, shape: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A class, an instance, a function, a matrix or a peer's operator that the command does not take."""
    assert cli.run(["check", f"{source}:{name}", "--shape", ",".join(map(str, shape))]) == 0
    printed = capsys.readouterr().out
    for word in ("dot test", "linearity", "same answer twice", "gram_solve residual", "singular value", "rank", "ms"):
        assert word in printed
    assert "FAILED" not in printed


def test_a_failure_has_an_exit_code_and_a_reason(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script would go on with a wrong operator."""
    assert cli.run(["check", f"{source}:wrong"]) == 3
    captured = capsys.readouterr()
    assert "FAILED" in captured.out
    assert "not the transpose" in captured.err


@pytest.mark.parametrize(
    ("name", "words"),
    [("text", "name an operator"), ("nothing", "returned a NoneType"), ("fails", "no such lens"),
     ("absent", "absent"), ("array", "columns")],
)  # fmt: skip
def test_bad_input(source: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback, or the exit code of a failed check, for a name that leads to no operator."""
    assert cli.run(["check", f"{source}:{name}", "--shape", "3,4,4"]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_shape_is_asked_for(source: Path) -> None:
    """Without a shape an object with a forward of its own cannot become an operator."""
    with pytest.raises(OperatorError, match="--shape"):
        load_operator(f"{source}:Pair")
    assert isinstance(load_operator(f"{source}:array"), Matrix)


def test_tables_are_markdown() -> None:
    """Pasted into a report, the tables would be a heap of words."""
    text = inspect_operator(Identity(), (1, 4, 4)).text()
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        lines = table.splitlines()
        columns = lines[0].count("|")
        assert set(lines[1]) <= set("|-: ")
        assert all(line.count("|") == columns and len(line) == len(lines[0]) for line in lines)


def test_what_is_not_known_is_said() -> None:
    """An iterative solve that stopped early, shown like an exact one."""
    scales = torch.logspace(0, -4, 1000).double()
    hard = Callable(lambda x: scales.to(x) * x, shape=(1000,), max_iterations=20)
    inspection = inspect_operator(hard, (1000,))
    text = inspection.text()
    assert "<=" in text
    assert "raise max_iterations" in text
    assert "not known" in text


def test_a_loud_matrix_is_no_failure() -> None:
    """What float32 rounds grows with the size of A: an operator of norm 1000 is right all the same."""
    A = Matrix(1e3 * torch.randn(20, 30, generator=torch.Generator().manual_seed(0)))
    assert not inspect_operator(A, (30,)).failed
