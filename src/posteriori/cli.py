"""The command line. Nothing is computed here; heavy modules are imported by the command that needs them.

Exit codes: 0 done; 1 a bug (with its traceback); 2 bad input, one line on stderr; 3 ``check`` found a failure;
130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Restore photos by sampling the posterior of a linear inverse problem with a diffusion model. "
    "sigma_y is always in the units of images in [-1, 1].",
)

# Errors that are the input's fault. They are looked up among the loaded modules: importing them would load torch.
_INPUT_ERRORS = (
    ("posteriori.images", "ImageError"),
    ("posteriori.problems", "InputError"),
    ("posteriori.loading", "OperatorError"),
    ("posteriori.checkpoint", "CheckpointError"),
    ("posteriori.recipe", "RecipeError"),
    ("posteriori.backbones.pipelines", "PretrainedError"),
    ("posteriori.convert", "ConvertError"),
)
# click's base class of wrong usage, wherever this version of typer keeps click
_USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

Seed = Annotated[int, typer.Option(help="Seed of masks, kernels, noise and samples.")]
Model = Annotated[str, typer.Option(help="Bundled name, folder with model.safetensors and model.json, or hub id.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU when there is one.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all cores when left out.")]


class UsageError(Exception):
    """Bad input noticed here."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``posteriori`` command."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        code = app(args=arguments, prog_name="posteriori", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130  # what typer itself returns in some versions
    except typer.Exit as error:
        return int(error.exit_code)
    except _USAGE_ERROR as error:
        name = type(error).__name__
        if name == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            return 0
        return _fail(f"{error.format_message()} (posteriori --help lists what there is)")
    except Exception as error:
        if is_input_error(error):
            return _fail(str(error))
        traceback.print_exc()
        typer.echo("this is a bug in posteriori: please report the lines above", err=True)
        return 1
    if code == 130:
        typer.echo("interrupted; finished results are kept, start again to continue", err=True)
    return code if isinstance(code, int) else 0


def is_input_error(error: Exception) -> bool:
    """Whether an error is the input's fault."""
    known = [getattr(sys.modules.get(module), name, None) for module, name in _INPUT_ERRORS]
    return isinstance(error, (UsageError, *(k for k in known if isinstance(k, type))))


def _fail(message: str) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


def _version(show: bool) -> None:
    if show:
        from posteriori._version import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


def set_up(device: str, threads: int | None) -> str:
    """The device to use; sets the number of threads."""
    import torch

    if threads is not None:
        if threads < 1:
            raise UsageError(f"--threads is {threads}: give at least 1")
        torch.set_num_threads(threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}): try cpu") from None
    return device


@app.command()
def restore(
    photos: Annotated[list[Path], typer.Argument(help="Photos, or folders of photos.", show_default=False)],
    sigma_y: Annotated[
        str, typer.Option(help="Noise of the measurement, images in [-1, 1]; auto: estimated.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Results go to OUTPUT/<photo>/.")],
    task: Annotated[
        str | None, typer.Option(help="inpaint, box, sr, gaussian, motion, denoise or custom.", show_default=False)
    ] = None,
    degrade: Annotated[bool, typer.Option("--degrade", help="The photos are clean: measure them first.")] = False,
    mask: Annotated[Path | None, typer.Option(help="inpaint, box: image, white = missing.")] = None,
    missing: Annotated[
        float | None, typer.Option(help="inpaint with --degrade: share of missing pixels (default 0.7)")
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="box with --degrade: side, or WIDTHxHEIGHT (default half the shorter side)")
    ] = None,
    scale: Annotated[int | None, typer.Option(help="sr: factor (default 4)")] = None,
    sr_kernel: Annotated[str | None, typer.Option(help="sr: box or bicubic (default box)")] = None,
    blur_sigma: Annotated[float | None, typer.Option(help="gaussian: width in pixels (default 3)")] = None,
    kernel: Annotated[
        Path | None, typer.Option(help="motion, sr: .npy, .txt or image; centre at entry size // 2; scaled to sum 1.")
    ] = None,
    boundary: Annotated[
        str | None, typer.Option(help="reflect, replicate, zero or circular (default reflect; motion: circular)")
    ] = None,
    operator: Annotated[
        str | None, typer.Option(help="custom: module:name or file.py:name of an operator or of what makes one.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Posterior samples.")] = 4,
    nfe: Annotated[
        int | None,
        typer.Option(help="Network evaluations per sample (default: the method's own; eps 8)", show_default=False),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="eps; to compare with: zero-shot-pivot, dps, daps, daps-calibrated, ddnm, ddrm, pigdm, mmps, mpgd, "
            "diffpir, red-diff, palette (with a network of its own), linear, tv."
        ),
    ] = "eps",
    model: Model = "photo",
    precision: Annotated[str, typer.Option(help="float32, bfloat16; auto: the latter on CPUs that have it.")] = "auto",
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Restore again what is finished.")] = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Restore photos that are degraded, or clean ones after degrading them (--degrade).

    Photos may have 16x16 to 2048x2048 pixels, in colour, grey, transparent or 16-bit grey.

    OUTPUT/<photo>/ gets mmse.png (posterior mean), sample-NN.png, mean.png and std.png (of the samples),
    report.png (all on one sheet) and report.json (figures). Photos finished with the same settings are skipped.

    With --degrade the measurement is kept as measurement.npy, which can be restored like a photo; an 8-bit file would
    clip it to [0, 255] and round it.
    """
    from posteriori.batch import restore_all
    from posteriori.methods import get_method
    from posteriori.problems import InputError, TaskOptions
    from posteriori.restore import RestoreOptions

    if task is None:
        if operator is None:
            raise UsageError("which --task? choose inpaint, box, sr, gaussian, motion, denoise or custom")
        task = "custom"
    try:
        chosen = TaskOptions(
            task=task, sigma_y=_level(sigma_y), degrade=degrade, mask=mask, missing=missing, box=_box(box), scale=scale,
            sr_kernel=sr_kernel, blur_sigma=blur_sigma, kernel=kernel, boundary=boundary, operator=operator, seed=seed,
        )  # fmt: skip
        nfe = max(get_method(method).nfe, 1) if nfe is None else nfe
        how = RestoreOptions(samples, nfe, method, model, seed, precision)
    except ValueError as error:
        raise InputError(str(error)) from None
    failures = restore_all(photos, output, chosen, how, set_up(device, threads), force)
    if failures:
        raise typer.Exit(2)


def _level(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--sigma-y is {text!r}: give a number, such as 0.05, or auto") from None


def _box(text: str | None) -> tuple[int, int] | None:
    """``"128"`` or ``"96x128"`` (width x height) as height and width."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise UsageError(f"--box is {text!r}: give a side in pixels, or WIDTHxHEIGHT such as 96x128")
    return int(parts[-1]), int(parts[0])


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the contact sheet.")] = Path("demo"),
    nfe: Annotated[int, typer.Option(help="Network evaluations per sample.")] = 8,
    model: Model = "photo",
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Restore five bundled photos in five tasks; writes OUTPUT/demo.png and OUTPUT/demo.json."""
    from posteriori.batch import show_demo
    from posteriori.restore import RestoreOptions

    show_demo(output, RestoreOptions(samples=2, nfe=nfe, model=model, seed=seed), set_up(device, threads))


@app.command()
def models() -> None:
    """List the bundled models: size, tasks, noise, training data and its licence, figures."""
    from rich.console import Console

    from posteriori.batch import models_table

    Console(soft_wrap=False).print(models_table())


@app.command()
def check(
    operator: Annotated[
        str, typer.Argument(help="module:name or file.py:name of an operator or of what makes one.", show_default=False)
    ],
    shape: Annotated[
        str | None, typer.Option(help="Shape of a signal (default the operator's own, or 3,64,64)")
    ] = None,
) -> None:
    """Check an operator of your own and measure it; prints Markdown tables. Exit code 3 when a check fails.

    Checked: adjoint, linearity, repeatability, batches, solves. Measured: singular values, how exact the pivot is at
    20 pairs of noise levels, time and memory. It may come from posteriori, scipy, pylops or deepinv.
    """
    from posteriori.checks import inspect_operator
    from posteriori.loading import load_operator

    sizes = _shape(shape) if shape else None
    found = load_operator(operator, sizes or (3, 64, 64))
    try:
        inspection = inspect_operator(found, sizes or getattr(found, "shape", None) or (3, 64, 64))
    except Exception as error:  # whatever the user's operator does
        first = " ".join(str(error).split())
        typer.echo(f"check failed: {found!r} raised {type(error).__name__}: {first}", err=True)
        raise typer.Exit(3) from None
    typer.echo(inspection.text())
    for row in inspection.failed:
        typer.echo(f"check failed: {row.name}: {row.advice}", err=True)
    if inspection.failed:
        raise typer.Exit(3)


def _shape(text: str) -> tuple[int, ...]:
    parts = text.replace("x", ",").split(",")
    if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise UsageError(f"--shape is {text!r}: give positive sizes such as 3,64,64")
    return tuple(int(p) for p in parts)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; its model/ can be loaded.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, dotted keys for nested ones; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUTPUT.")] = False,
    threads: Threads = None,
) -> None:
    """Train a model by a recipe."""
    set_up("cpu", threads)
    try:
        import accelerate  # noqa: F401
        import yaml  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"training needs {error.name}: pip install 'posteriori[train]'") from None
    from posteriori.train import RecipeError, load_recipe
    from posteriori.train import train as run_training

    plan = load_recipe(recipe, overrides)
    try:
        run_training(plan, output, resume=resume)
    except OSError as error:
        raise RecipeError(f"cannot write to {output} ({error.strerror}): choose another --output") from None
    except ValueError as error:  # missing photos, impossible sizes
        raise RecipeError(str(error)) from None
    typer.echo(f"model: {output / 'model'}")


@app.command()
def benchmark(
    recipe: Annotated[Path, typer.Argument(help="YAML file; its key kind says what is measured.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run (default runs/NAME)")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, dotted keys; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(help="Measure at most so many rows now.", show_default=False)] = None,
    document: Annotated[
        Path | None, typer.Option(help="The report, its files beside it (default OUT/report.md)", show_default=False)
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Measure nothing: the report of this rows.jsonl(.gz).", show_default=False)
    ] = None,
    paper: Annotated[
        Path | None, typer.Option(help="JSON file with a paper's tables, shown beside (images).", show_default=False)
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Measure what a recipe lists, and write tables and figures. A run that was stopped continues where it was."""
    device = set_up(device, threads)
    try:
        import matplotlib as mpl  # noqa: F401
        import scipy  # noqa: F401
        import yaml  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"benchmarks need {error.name}: pip install 'posteriori[benchmark]'") from None
    from posteriori.bench.runner import benchmark as run_benchmark
    from posteriori.bench.runner import report_again

    overrides = [*(overrides or []), *([f"paper={paper}"] if paper else [])]
    if rows:
        typer.echo(f"report: {report_again(recipe, rows, overrides, document)}")
        return
    typer.echo(f"report: {run_benchmark(recipe, out, overrides, limit=limit, document=document, device=device)}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New or empty folder.", show_default=False)],
    scheduler: Annotated[
        str,
        typer.Option(help="[edm-]dpm++, unipc, deis, ddim, ddpm, [edm-, flow-]euler, euler-ancestral, [flow-]heun"),
    ] = "dpm++",
) -> None:
    """Write a model as a diffusers pipeline, for DiffusionPipeline.from_pretrained(OUTPUT, trust_remote_code=True)."""
    from posteriori.export import export_model

    try:
        export_model(model, output, scheduler)
    except ValueError as error:
        raise UsageError(str(error)) from None
    typer.echo(f"pipeline: {output}")


@app.command()
def convert(
    file: Annotated[
        Path, typer.Argument(help="Pickled checkpoint: .pt, .pth, .pkl, .ckpt or .bin.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the converted weights.", show_default=False)
    ],
    licence: Annotated[
        str | None, typer.Option("--license", help="Of the weights, e.g. CC-BY-NC-SA-4.0; where the file states none.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="edm, diffusers or weights; found when left out.", show_default=False)
    ] = None,
    entry: Annotated[
        str | None, typer.Option(help="The part of the file that is the network, e.g. ema; found when left out.")
    ] = None,
) -> None:
    """Convert somebody's pickled weights to safetensors, without running any code of the file.

    The folder can be loaded with posteriori.backbones.load_pretrained; its card keeps the licence.
    """
    from posteriori.convert import convert as convert_file

    typer.echo(f"weights: {convert_file(file, output, licence, kind, entry)}")
