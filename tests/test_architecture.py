"""The floors of the architecture: imports point downward, heavy ones are lazy, files stay readable, nothing pickles.

The sources are parsed, not imported: a forbidden import inside a function is found too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "posteriori"

# A module may import from its own floor and from those below. A package (operators, backbones, ...) is one entry.
FLOORS = {
    "_version": 0,
    "schedule": 0,
    "scaling": 0,
    "solve": 0,
    "memory": 0,
    "pickles": 0,
    "operators": 1,
    "pivot": 2,
    "conditioning": 2,
    "joint": 2,
    "precision": 2,
    "denoise": 2,
    "solvers": 2,
    "exponential": 2,
    "grids": 2,
    "rescheduled": 2,
    "posterior": 2,
    "smooth": 2,
    "width": 2,
    "sample": 2,
    "noise": 2,
    "noise_level": 2,
    "priors": 3,
    "objective": 3,
    "backbones": 3,
    "methods": 4,
    "data": 4,
    "checkpoint": 4,
    "convert": 4,
    "metrics": 4,
    "perceptual": 4,
    "tasks": 4,
    "images": 4,
    "adapters": 4,
    "loading": 4,
    "sheets": 4,
    "tiling": 4,
    "recipe": 5,
    "train": 5,
    "bench": 5,
    "problems": 5,
    "restore": 5,
    "checks": 5,
    "demo": 5,
    "export": 5,
    "batch": 5,
    "cli": 6,
    "app": 6,
    "__main__": 6,
}

# Who may import, when it is itself imported, a package that only an extra installs.
EXTRAS_AT_IMPORT = {
    "train": {"accelerate", "yaml"},
    "metrics": {"scipy", "scoringrules", "torchmetrics"},
    "bench": {"matplotlib", "scipy", "scoringrules", "torchmetrics", "yaml"},
}

# What `posteriori --help` and `import posteriori` must not wait for.
HEAVY = ("torch", "numpy", "scipy", "diffusers", "accelerate", "PIL", "matplotlib", "safetensors", "huggingface_hub")

LINES = 400

FILES = sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One imported name: the dotted module or object, the line, and whether importing the file runs it."""

    target: str
    line: int
    eager: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def component(module: str) -> str:
    """``posteriori.operators.base`` -> ``operators``; the facade itself -> ``""``."""
    return module.partition(".")[2].partition(".")[0]


def imports(tree: ast.Module, path: Path) -> Iterator[Import]:
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def walk(node: ast.AST, eager: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, eager)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    up = package[: len(package) - child.level + 1]
                    base = ".".join([*up, base] if base else up)
                for alias in child.names:
                    yield Import(f"{base}.{alias.name}", child.lineno, eager)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for branch, runs in ((child.body, False), (child.orelse, eager)):
                    for statement in branch:
                        yield from walk(ast.Module([statement], []), runs)
            else:
                yield from walk(child, eager and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from walk(tree, True)


def parsed() -> Iterator[tuple[Path, ast.Module]]:
    for path in FILES:
        yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def own_imports(path: Path, tree: ast.Module) -> Iterator[tuple[Import, str]]:
    """Imports of this package with the component each names."""
    for imported in imports(tree, path):
        if imported.target.split(".")[0] == "posteriori":
            yield imported, component(imported.target)


def test_every_module_has_a_floor() -> None:
    """A module without a floor would escape every rule below."""
    unknown = {component(module_name(p)) for p in FILES} - {""} - set(FLOORS)
    assert not unknown, (
        f"no floor for {', '.join(sorted(unknown))}: add each to FLOORS in {Path(__file__).name}, "
        "at the lowest floor that is above everything it imports"
    )


def test_imports_point_downward() -> None:
    """An upward import ties the mathematics to a command line or a trainer, and readers into knots."""
    wrong = []
    for path, tree in parsed():
        here = component(module_name(path))
        if not here:
            continue  # the facade points at every floor; what it may load is tested below
        for imported, target in own_imports(path, tree):
            if target not in FLOORS:
                wrong.append(
                    f"{where(path, imported.line)}: imports {imported.target} through the facade: "
                    "import it from the module that defines it"
                )
            elif FLOORS[target] > FLOORS.get(here, -1):
                wrong.append(
                    f"{where(path, imported.line)}: {here} (floor {FLOORS.get(here)}) "
                    f"imports {target} (floor {FLOORS[target]})"
                )
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    """Modules of one floor may build on each other, in one direction only: a cycle has no reading order."""
    graph: dict[str, set[str]] = {}
    for path, tree in parsed():
        here = component(module_name(path))
        if here:
            graph.setdefault(here, set()).update(t for _, t in own_imports(path, tree) if t != here)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("modules import each other in a circle: " + " -> ".join(error.args[1]))


def test_core_installation_can_import_everything_it_needs() -> None:
    """A top-level import of something only an extra installs would break ``import posteriori`` for plain installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[^\w-]", d)[0].lower() for d in project["dependencies"]}
    core = {"PIL" if name == "pillow" else name for name in names} | {"posteriori"} | set(sys.stdlib_module_names)
    wrong = []
    for path, tree in parsed():
        allowed = core | EXTRAS_AT_IMPORT.get(component(module_name(path)), set())
        wrong += [
            f"{where(path, i.line)}: {i.target}"
            for i in imports(tree, path)
            if i.eager and i.target.split(".")[0] not in allowed
        ]
    assert not wrong, "not a core dependency: import it inside the function that needs it\n" + "\n".join(wrong)


@pytest.mark.parametrize("module", ["posteriori", "posteriori.cli"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    """A heavy import, direct or through another module, would make ``--help`` and completion wait for seconds."""
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}} & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"import {module} loads {done.stdout.strip()}: import inside the functions"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_files_are_short(path: Path) -> None:
    """A file that outgrows a reader's patience has to say why, near its top: ``# long because ...``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    excused = any(re.search(r"long because \S", line) for line in lines[:60])
    assert len(lines) <= LINES or excused, (
        f"{path.relative_to(ROOT)} has {len(lines)} lines, the limit is {LINES}: split it, or say '# long because ...'"
    )


def test_baselines_are_short() -> None:
    """A baseline over 100 lines is hard to check against its paper."""
    for path in sorted((PACKAGE / "methods").glob("*.py")):
        if path.stem not in ("__init__", "base"):
            count = len(path.read_text(encoding="utf-8").splitlines())
            assert count <= 100, f"{path.relative_to(ROOT)} has {count} lines, a baseline has at most 100"


def test_nothing_pickles() -> None:
    """Loading a pickle runs whatever code its author put there; checkpoints are safetensors and JSON."""
    modules = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    calls = {"torch.load", "torch.save", "torch.jit.load", "accelerator.save_state", "accelerator.load_state"}
    wrong = []
    for path, tree in parsed():
        for imported in imports(tree, path):
            top = imported.target.split(".")[0]
            if top in modules or imported.target in calls:
                wrong.append(f"{where(path, imported.line)}: {imported.target}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).removeprefix("self.").lstrip("_")
                unsafe = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
                if called in calls or unsafe:
                    wrong.append(f"{where(path, node.lineno)}: {called}{' with allow_pickle' if unsafe else ''}")
    assert not wrong, "pickles:\n" + "\n".join(wrong)
