"""What is installed: one version, lazy public names, light dependencies, and a wheel with everything in it."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

import posteriori

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# The names the documentation promises, written out again: a name dropped from the package by mistake is noticed here.
MODULES = ("adapters", "backbones", "noise", "operators", "priors")
CLASSES = (
    "CosineVP",
    "Denoiser",
    "DiscreteVP",
    "ExactPosterior",
    "NetworkDenoiser",
    "Posterior",
    "RectifiedFlow",
    "Schedule",
    "VE",
    "VP",
)
FUNCTIONS = (
    "estimate_sigma_y", "linear_estimate", "load", "measure", "pivot", "read_image", "sample", "sample_pivot",
    "save", "write_image",
)  # fmt: skip


def python(code: str) -> str:
    """Run code in a fresh interpreter (what is imported, and in which order, is what these tests are about)."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def requirement_name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower()


def test_version_has_one_source() -> None:
    """Two places to write a version are two versions sooner or later."""
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(dev|a|b|rc)\d+)?", posteriori.__version__)
    assert "version" in PROJECT["dynamic"]
    assert "version" not in PROJECT
    files = [*ROOT.glob("*.toml"), *ROOT.glob("*.cff"), *(ROOT / "src").rglob("*.py")]
    holders = [p.name for p in files if f'"{posteriori.__version__}"' in p.read_text(encoding="utf-8")]
    assert holders == ["_version.py"]
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)


def test_installed_version_is_the_source_version() -> None:
    """A stale installation would report, and write into every report, the version of another source."""
    assert importlib.metadata.version("posteriori") == posteriori.__version__


def test_changelog_describes_this_version() -> None:
    """A version without an entry leaves its users guessing what changed."""
    entries = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert posteriori.__version__ in entries


def test_public_names_are_the_documented_ones() -> None:
    """The list above, ``__all__`` and ``dir`` disagree: a name is public by accident, or was lost."""
    assert set(posteriori.__all__) == {*MODULES, *CLASSES, *FUNCTIONS, "__version__"}
    assert set(posteriori.__all__) <= set(dir(posteriori))


@pytest.mark.parametrize("name", CLASSES)
def test_public_class_resolves(name: str) -> None:
    """The lazy table points to a module that does not define the class."""
    assert isinstance(getattr(posteriori, name), type)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_function_resolves(name: str) -> None:
    """The lazy table points to a module that does not define the function, or to the module itself."""
    value = getattr(posteriori, name)
    assert callable(value)
    assert value.__name__ == name
    assert value is vars(sys.modules[value.__module__])[name]


@pytest.mark.parametrize("name", MODULES)
def test_public_module_resolves(name: str) -> None:
    """``po.operators.Blur`` needs ``po.operators`` without an import of its own."""
    assert python(f"import posteriori as po; print(po.{name}.__name__)") == f"posteriori.{name}"


def test_unknown_name_says_what_there_is() -> None:
    """A typing error must be an AttributeError (``hasattr`` relies on it) that helps."""
    with pytest.raises(AttributeError, match="ExactPosterior"):
        _ = posteriori.exactposterior
    assert not hasattr(posteriori, "nothing")


def test_type_checkers_see_the_names_the_table_has() -> None:
    """The block for type checkers and the lazy table drifted apart: an editor would complete what does not exist."""
    source = (ROOT / "src/posteriori/__init__.py").read_text(encoding="utf-8")
    block = source.split("if TYPE_CHECKING:\n")[1].split("\n\n")[0]
    stated = {}
    for module, names in re.findall(r"from posteriori(?:\.(\w+))? import (.+)", block):
        stated.update(dict.fromkeys(names.split(", "), module))
    assert stated == {**dict.fromkeys(MODULES, ""), **posteriori._HOME}


IMPORTS = (
    "import posteriori.pivot",
    "import posteriori.sample",
    "import posteriori.denoise",
    "from posteriori.pivot import linear_estimate",
    "from posteriori import pivot, sample",
    "from posteriori.sample import sample; import posteriori.pivot",
    "import importlib; importlib.import_module('posteriori.sample')",
    "import posteriori; posteriori.pivot; posteriori.sample",
)


@pytest.mark.parametrize("first", IMPORTS)
def test_functions_survive_the_import_of_their_modules(first: str) -> None:
    """``posteriori.pivot`` and ``posteriori.sample`` are functions and modules: after some other code imported the
    module, ``po.pivot(...)`` would fail with "'module' object is not callable"."""
    python(f"""
        {first}
        import inspect
        import sys
        import posteriori as po

        assert inspect.isfunction(po.pivot) and inspect.isfunction(po.sample)
        import posteriori.sample
        import posteriori.pivot
        from posteriori import pivot, sample
        from posteriori.pivot import measure, pivot as inner_pivot
        from posteriori.sample import sample as inner_sample

        assert po.pivot is pivot is inner_pivot
        assert po.sample is sample is inner_sample
        assert po.measure is measure
        assert inspect.ismodule(sys.modules["posteriori.pivot"])
    """)


def test_reloading_the_package_keeps_the_functions() -> None:
    """Notebooks reload: the protection of the two names must not be lost with it."""
    python("""
        import importlib, inspect
        import posteriori as po
        importlib.reload(po)
        import posteriori.pivot
        assert inspect.isfunction(po.pivot) and inspect.isfunction(po.sample)
    """)


def test_core_dependencies_are_light() -> None:
    """Heavy or surprising installs, and pins that clash with other packages, are what users complain of elsewhere."""
    core = {"diffusers", "numpy", "pillow", "rich", "safetensors", "torch", "typer"}
    assert {requirement_name(r) for r in PROJECT["dependencies"]} == core
    everything = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    for requirement in everything:
        assert requirement_name(requirement) != "torchvision"
        assert not re.search(r"==|~=|<", requirement), f"{requirement}: give a lower bound only"
        assert ">=" in requirement or requirement.startswith("posteriori["), f"{requirement}: give a lower bound"


def test_constraints_satisfy_the_bounds() -> None:
    """The tested versions must be among those the package asks for, or the tests test something else."""
    lines = (ROOT / "requirements/constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    assert "torchvision" not in tested
    for requirement in [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]:
        if requirement.startswith("posteriori["):
            continue
        name, bound = requirement.lower().split(">=")
        assert name in tested, f"{name} has no tested version in requirements/constraints.txt"
        have, want = ([int(n) for n in re.findall(r"\d+", v)] for v in (tested[name], bound))
        assert have >= want, f"{name}: tested with {tested[name]}, asks for {bound}"


def test_all_extra_is_what_users_need() -> None:
    """``posteriori[all]`` must not miss an extra that a command tells its user to install. Whoever has operators or
    networks of another library, or asks a recipe for it, has that library."""
    libraries = {"azula", "datasets", "deepinv", "lora", "pylops", "tensorboard"}
    extras = set(PROJECT["optional-dependencies"]) - libraries - {"all", "dev", "docs"}
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert set(everything.removeprefix("posteriori[").removesuffix("]").split(",")) == extras


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    assert path.name == f"posteriori-{posteriori.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_wheel_has_every_source_and_asset(wheel: zipfile.ZipFile) -> None:
    """A file that git ignores or the build leaves out works in a checkout and is missing for everybody else."""
    source = ROOT / "src"
    expected = {
        p.relative_to(source).as_posix()
        for p in (source / "posteriori").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    packed = {n for n in wheel.namelist() if n.startswith("posteriori/")}
    assert packed == expected
    assert "posteriori/py.typed" in packed


def test_wheel_has_the_bundled_model_and_photos(wheel: zipfile.ZipFile) -> None:
    """Without them ``posteriori demo`` needs a network; above 12 MiB the model makes the install heavy."""
    assets = [i for i in wheel.infolist() if i.filename.startswith("posteriori/assets/")]
    by_suffix = {suffix: [i for i in assets if i.filename.endswith(suffix)] for suffix in (".safetensors", ".json")}
    assert by_suffix[".safetensors"], "no model"
    assert by_suffix[".json"], "no model card"
    assert any(i.filename.lower().endswith((".jpg", ".jpeg", ".png")) for i in assets), "no photos"
    assert sum(i.file_size for i in by_suffix[".safetensors"]) <= 12 * 2**20


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    """The command, the licence, or the dependencies got lost on the way into the wheel."""
    folder = f"posteriori-{posteriori.__version__}.dist-info"
    assert "posteriori = posteriori.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert "Apache License" in wheel.read(f"{folder}/licenses/LICENSE").decode()
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    required = {
        requirement_name(r) for r in re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE) if "extra ==" not in r
    }
    assert required == {requirement_name(r) for r in PROJECT["dependencies"]}
