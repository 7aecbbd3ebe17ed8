"""Export to diffusers: every scheduler draws the exact posterior, and a folder gives back the model that went in.

The prior is a Gaussian, whose denoiser and posterior are known in float64. How the mean and the covariance of samples
are had without Monte Carlo error is told in :mod:`posteriori.bench.schedulers`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import posteriori as po
from posteriori.backbones import load_pretrained
from posteriori.bench import schedulers
from posteriori.bench.schedulers import STOCHASTIC, distribution, draw, errors
from posteriori.cli import run
from posteriori.export import SCHEDULERS, PosteriorPipeline, export_model, make_scheduler, to_pipeline
from posteriori.export.schedulers import scales
from posteriori.pivot import sample_generator
from tiny_model import save_tiny_model

D = 4
_ROOT = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MEAN = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64)
COV = 0.09 * _ROOT @ _ROOT.T + 0.05 * torch.eye(D, dtype=torch.float64)
A = po.operators.Matrix(torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]], dtype=torch.float64))
Y = torch.tensor([[0.4, -0.3]], dtype=torch.float64)
SIGMA_Y = 0.2
PRIOR = po.priors.Gaussian(MEAN, COV)
PROBLEM = po.ExactPosterior(PRIOR, A, Y, SIGMA_Y)
EXACT = PRIOR.posterior(A, Y, SIGMA_Y)

#: Relative error of the covariance after 100 steps: measured, and a third on top. The first order has 1/steps.
TOLERANCE = {
    "dpm++": 0.004, "unipc": 0.004, "deis": 0.004, "ddim": 0.18, "ddpm": 0.32, "euler": 0.14, "euler-ancestral": 0.32,
    "heun": 0.075, "edm-euler": 0.085, "edm-dpm++": 0.006, "flow-euler": 0.055, "flow-heun": 0.002,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """diffusers warns of every setting that another scheduler does not have."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    yield
    diffusers.utils.logging.set_verbosity_warning()


def pipeline(denoiser: po.Denoiser = PRIOR) -> PosteriorPipeline:
    pipe = to_pipeline(denoiser)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def swap(pipe: PosteriorPipeline, name: str, **settings: Any) -> None:
    """The line that users of diffusers write."""
    kind = getattr(diffusers, SCHEDULERS[name])
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)


def spread_at(pipe: PosteriorPipeline, steps: int) -> tuple[float, float]:
    """Errors of mean and covariance of a deterministic scheduler."""
    return errors(*distribution(pipe, PROBLEM, steps), EXACT)


def drawn_at(pipe: PosteriorPipeline, steps: int) -> tuple[float, float]:
    """The same of a thousand samples."""
    return errors(*draw(pipe, PROBLEM, steps, 1000), EXACT)


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n not in STOCHASTIC])
def test_scheduler_converges_to_the_exact_posterior(name: str) -> None:
    """The scheduler is told the wrong quantity, or that of the wrong noise: its samples have another mean or spread,
    however many steps it takes. The mean keeps what a start from pure noise at finite noise leaves out (0.003)."""
    pipe = pipeline()
    swap(pipe, name)
    coarse, fine = (spread_at(pipe, steps) for steps in (20, 100))
    assert fine[0] < 0.004
    assert fine[1] < TOLERANCE[name]
    assert fine[1] < 0.4 * coarse[1]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_draws_the_exact_posterior(name: str) -> None:
    """Noise drawn by the pipeline or by the scheduler has the wrong size, which more steps do not mend, or samples
    share it. Monte Carlo error with n = 1000: 0.03 for the mean, 0.07 for the covariance (one standard deviation)."""
    pipe = pipeline()
    swap(pipe, name)
    mean, cov = drawn_at(pipe, 100)
    assert mean < 0.1
    assert cov < TOLERANCE[name] + 0.2
    if name in STOCHASTIC:
        assert cov < 0.5 * drawn_at(pipe, 10)[1]


def test_errors_are_those_of_the_posterior() -> None:
    """The ruler is wrong. One standard deviation off in every direction, and no spread at all, are errors of 1."""
    off = EXACT.mean + torch.linalg.cholesky(EXACT.covariance).sum(1)
    assert errors(off, torch.zeros(D, D, dtype=torch.float64), EXACT) == pytest.approx((1, 1))
    assert errors(EXACT.mean, EXACT.covariance, EXACT) == pytest.approx((0, 0), abs=1e-9)


def test_bench_prints_what_it_measured(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The table of the documentation could not be made again, or is not that of the figures beside it."""
    monkeypatch.setattr(schedulers, "STEPS", (10, 60))
    assert schedulers.main(["--out", str(tmp_path / "rows.jsonl"), "--side", "2", "--samples", "400"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    table = capsys.readouterr().out.split("| --- |")[1]
    for name, kind in SCHEDULERS.items():
        coarse, fine = (r["covariance"] for r in rows if r["scheduler"] == name)
        assert fine < 0.6 * coarse
        assert f"| `{kind}` | `{name}` | {coarse:.2g} | {fine:.2g} |" in table


PREDICTIONS = [
    *((name, kind, {}) for name in ("ddim", "dpm++", "unipc", "euler") for kind in ("sample", "v_prediction")),
    ("edm-euler", "v_prediction", {}),
    *((name, "flow_prediction", {"use_flow_sigmas": True, "use_karras_sigmas": False}) for name in ("dpm++", "unipc")),
]


@pytest.mark.parametrize(("name", "kind", "settings"), PREDICTIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_every_prediction_type(name: str, kind: str, settings: dict[str, Any]) -> None:
    """A scheduler made for velocities or for images is told the noise, or the velocity in another convention."""
    pipe = pipeline()
    swap(pipe, name, **settings)
    if kind == "flow_prediction":
        swap(pipe, name, prediction_type=kind)
        assert spread_at(pipe, 100)[1] < 0.03
        return
    noise = distribution(pipe, PROBLEM, 20)
    swap(pipe, name, prediction_type=kind)
    for a, b in zip(distribution(pipe, PROBLEM, 20), noise, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


def test_scales_are_the_schedulers_own() -> None:
    """Scales of another step, or in another convention. VP schedulers step alpha^2 + sigma^2 = 1 with the table's
    alphas, those of Karras et al. alpha = 1, flows alpha + sigma = 1."""
    for name in SCHEDULERS:
        scheduler = type(make_scheduler(name)).from_config(make_scheduler().config)
        scheduler.set_timesteps(7)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        alpha, sigma = scales(scheduler, scheduler.timesteps[0])
        if name.startswith("flow"):
            assert alpha == pytest.approx(1 - sigma, abs=1e-7)
            assert sigma == pytest.approx(float(scheduler.sigmas[0]))
        elif name.startswith(("edm", "euler", "heun")):
            assert (alpha, sigma) == (1, pytest.approx(float(scheduler.sigmas[0])))
        else:
            assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-6)
            assert alpha**2 == pytest.approx(float(scheduler.alphas_cumprod[999]), rel=1e-4)


SCHEDULES = [po.VE(), po.VP(), po.CosineVP(), po.RectifiedFlow()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 3.0), (0.6, 0.8), (0.25, 0.75), (0.05, 1.4), (0.999, 0.01)])
def test_a_denoiser_transfers_between_schedules(schedule: po.Schedule, alpha: float, sigma: float) -> None:
    """``denoise_at`` answers for another signal than it was given. Oracle: the mean of the Gaussian given ``x`` and
    ``y``, from its precision."""
    posterior = po.ExactPosterior(po.priors.Gaussian(MEAN, COV, schedule), A, Y.expand(3, -1), SIGMA_Y)
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = A(torch.eye(D, dtype=torch.float64)).T
    eye = torch.eye(D, dtype=torch.float64)
    precision = torch.linalg.inv(COV) + matrix.T @ matrix / SIGMA_Y**2 + alpha**2 / sigma**2 * eye
    known = torch.linalg.solve(COV, MEAN) + Y @ matrix / SIGMA_Y**2 + alpha / sigma**2 * x
    expected = torch.linalg.solve(precision, known.T).T
    answer = posterior.denoise_at(x, alpha, sigma)
    torch.testing.assert_close(answer.mean, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(answer.noise, (x - alpha * expected) / sigma)
    each = posterior.denoise_at(x, torch.full((3,), alpha), torch.full((3,), sigma)).mean
    torch.testing.assert_close(each, expected, atol=1e-6, rtol=1e-6)


def test_a_denoiser_without_signal_is_the_posterior_mean() -> None:
    """A flow starts at alpha = 0, where the pivot does not exist: NaN, or an error, at its first step."""
    posterior = po.ExactPosterior(PRIOR, A, Y, SIGMA_Y)
    x = torch.randn(1, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    answer = posterior.denoise_at(x, 0.0, 1.0)
    torch.testing.assert_close(answer.mean[0], EXACT.mean, atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="sigma > 0"):
        posterior.denoise_at(x, 1.0, 0.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(tiny, tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="module")
def problem() -> tuple[Any, Tensor]:
    """Two photos' worth of colours, four times smaller."""
    operator = po.operators.Downsampling(4)
    x_0 = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return operator, po.measure(operator, x_0, sigma_y=0.05, seed=0)


def test_edm_scheduler_is_our_sampler(tiny: Path, problem: tuple[Any, Tensor]) -> None:
    """Two implementations of DPM-Solver++ (2M) on one grid of one network disagree: one of them has the network
    evaluated at another noise, or turns its answer into another prediction."""
    denoiser = po.load(tiny)
    operator, y = problem
    expected = po.sample(po.ExactPosterior(denoiser, operator, y, 0.05), n=3, nfe=12, seed=5, solver="dpmpp")
    pipe = pipeline(denoiser)
    swap(pipe, "edm-dpm++")
    # sample k of measurement b starts where ours does; diffusers scales it by sqrt(sigma_max^2 + 1), not sigma_max
    shape = (3, 16, 24)
    noise = torch.stack([torch.randn(shape, generator=sample_generator(5, b, k)) for k in range(3) for b in range(2)])
    start = noise.unflatten(0, (3, 2)) * 80 / 6401**0.5
    found = pipe(y, operator, 0.05, 12, 3, latents=start, output_type="pt").images
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["dpm++", "ddpm"])
def test_samples_do_not_depend_on_the_batch(tiny: Path, problem: tuple[Any, Tensor], name: str) -> None:
    """More samples, or other photos beside it, would change a photo's samples."""
    operator, y = problem
    pipe = pipeline(po.load(tiny))
    swap(pipe, name)

    def samples(y: Tensor, n: int) -> Tensor:
        return pipe(y, operator, 0.05, 3, n, torch.Generator().manual_seed(3), output_type="pt").images

    many = samples(y, 3)
    torch.testing.assert_close(samples(y[:1], 1), many[:1, :1], atol=1e-4, rtol=0)
    assert (many[0] - many[1]).abs().max() > 0.1, "samples of one photo are one sample"
    generator = torch.Generator().manual_seed(3)
    first, second = (pipe(y, operator, 0.05, 3, 1, generator, output_type="pt").images for _ in range(2))
    assert (first - second).abs().max() > 0.1, "a generator that goes on gives the same samples again"


def test_operators_with_their_own_parameters(tiny: Path) -> None:
    """With one mask per photo, samples are made with the mask of another photo."""
    masks = (torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    y = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * masks
    pipe = pipeline(po.load(tiny))
    start = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    both = pipe(y, po.operators.Inpainting(masks), 0.05, 3, 2, latents=start, output_type="pt").images
    for b in range(2):
        alone = po.operators.Inpainting(masks[b])
        one = pipe(y[b : b + 1], alone, 0.05, 3, 2, latents=start[:, b : b + 1], output_type="pt").images
        torch.testing.assert_close(both[:, b : b + 1], one, atol=1e-5, rtol=0)


def test_output_types_agree(tiny: Path, problem: tuple[Any, Tensor]) -> None:
    """Pictures are of another sample or range than the tensors, or in another order."""
    operator, y = problem
    pipe = pipeline(po.load(tiny))
    by_type = {
        kind: pipe(y, operator, 0.05, 2, 2, torch.Generator().manual_seed(0), output_type=kind).images
        for kind in ("pt", "np", "pil")
    }
    np.testing.assert_array_equal(by_type["np"], by_type["pt"].numpy())
    assert len(by_type["pil"]) == 4
    for picture, x in zip(by_type["pil"], by_type["pt"].flatten(0, 1), strict=True):
        shown = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(shown, x.clamp(-1, 1), atol=1 / 255 + 1e-6, rtol=0)


LOAD = """
import sys
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
import posteriori as po
from posteriori.pivot import sample_generator
y = torch.load(sys.argv[2], weights_only=True)
mean = pipe.mean(y, po.operators.Downsampling(4), sigma_y=0.05)
start = torch.randn(1, *mean.shape, generator=sample_generator(0, 0, 0))
one = pipe(y, po.operators.Downsampling(4), sigma_y=0.05, num_inference_steps=1, latents=start, output_type="pt")
torch.save([mean, one.images[0]], sys.argv[3])
"""


@pytest.mark.slow
def test_bundled_model_in_a_fresh_process(tmp_path: Path) -> None:
    """The line of the documentation does not load what `posteriori export` wrote, or loads another model. One step of
    a scheduler is one evaluation at the largest noise."""
    out, measured, answer = tmp_path / "photo", tmp_path / "y.pt", tmp_path / "mean.pt"
    assert run(["export", "photo", "-o", str(out)]) == 0
    photos = sorted((Path(po.__file__).parent / "assets").rglob("*.png"))
    operator = po.operators.Downsampling(4)
    y = po.measure(operator, po.read_image(photos[0])[..., :64, :48], sigma_y=0.05, seed=0)
    torch.save(y, measured)
    command = [sys.executable, "-c", LOAD, str(out), str(measured), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mean, one = torch.load(answer, weights_only=True)
    posterior = po.ExactPosterior(po.load("photo"), operator, y, 0.05)
    torch.testing.assert_close(mean, posterior.mean(), atol=1e-5, rtol=0)
    start = 80 * torch.randn(mean.shape, generator=sample_generator(0, 0, 0))
    torch.testing.assert_close(one, posterior.denoise(start, 80.0).mean.detach(), atol=1e-3, rtol=0)


def test_folder_gives_back_the_model(tiny: Path, folder: Path, problem: tuple[Any, Tensor], tmp_path: Path) -> None:
    """Weights, schedule, card or scheduler get lost on the way through a folder, or on a second way."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    operator, y = problem
    denoiser = po.load(tiny)
    expected = po.ExactPosterior(denoiser, operator, y, 0.05).mean()
    for loaded in (pipe, again):
        assert type(loaded) is PosteriorPipeline
        card = {k: v for k, v in denoiser.card.items() if k not in ("format", "sha256")}
        assert loaded.denoiser.card == card
        assert loaded.scheduler.config.timestep_spacing == "trailing"
        torch.testing.assert_close(loaded.mean(y, operator, 0.05), expected, atol=1e-6, rtol=0)
        samples = po.sample(po.ExactPosterior(loaded.denoiser, operator, y, 0.05), nfe=2)  # it is a denoiser of ours
        torch.testing.assert_close(samples, po.sample(po.ExactPosterior(denoiser, operator, y, 0.05), nfe=2))
    with pytest.raises(ValueError, match=r"trained for sigma_y in \[0.01, 0.2\]"):
        pipe(y, operator, sigma_y=0.5)


@torch.no_grad()
def test_pipeline_of_a_diffusers_model(tmp_path: Path) -> None:
    """A model taken over from diffusers and given back is another model. With nothing measured it must draw the samples
    of the pipeline it came from, from the same noise, also after a way through a folder."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = diffusers.UNet2DModel(
        16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, num_class_embeds=3, **blocks
    )
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    own = diffusers.DDIMScheduler(clip_sample=False)
    y = torch.zeros(2, 3, 16, 16)
    start = torch.randn(1, *y.shape, generator=torch.Generator().manual_seed(1))
    expected = start[0]
    own.set_timesteps(10)
    for t in own.timesteps:
        expected = own.step(network(expected, t, torch.tensor([1, 2])).sample, t, expected).prev_sample

    pipe = pipeline(load_pretrained(diffusers.DDIMPipeline(network, own), labels=[1, 2]))
    pipe.scheduler = own
    pipe.save_pretrained(tmp_path)
    loaded = PosteriorPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for each in (pipe, loaded):
        found = each(y, po.operators.Nothing(), 0.05, 10, latents=start, output_type="pt").images[0]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_code_of_the_folder_runs_only_when_trusted(folder: Path, tmp_path: Path) -> None:
    """Loading a stranger's folder through our class would run the stranger's file."""
    out = tmp_path / "x"
    PosteriorPipeline.from_pretrained(folder).save_pretrained(out)
    (out / "pipeline.py").write_text("raise RuntimeError('ran')\n")
    assert type(PosteriorPipeline.from_pretrained(out)) is PosteriorPipeline
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(folder: Path, problem: tuple[Any, Tensor], dtype: torch.dtype) -> None:
    """Half of the digits are lost in a solve, where they drown the measurement, or mixed precisions fail."""
    operator, y = problem
    pipe = PosteriorPipeline.from_pretrained(folder, torch_dtype=dtype)
    full = PosteriorPipeline.from_pretrained(folder)
    assert {p.dtype for p in pipe.denoiser.parameters()} == {dtype}
    mean, expected = pipe.mean(y, operator, 0.05), full.mean(y, operator, 0.05)
    assert mean.dtype == torch.float32
    assert float((mean - expected).square().mean().sqrt() / expected.std()) < 0.02
    assert float((operator(mean) - operator(expected)).abs().max()) < 0.05  # what is measured is kept
    torch.testing.assert_close(pipe.to(torch.float32).mean(y, operator, 0.05), expected, atol=0.02, rtol=0.02)


def test_offloading_moves_the_network(folder: Path, problem: tuple[Any, Tensor], monkeypatch: Any) -> None:
    """The network is called past the hook that would bring it to the accelerator, and runs, slowly, where it lies."""
    import accelerate.hooks

    calls = []
    before = accelerate.hooks.CpuOffload.pre_forward
    monkeypatch.setattr(
        accelerate.hooks.CpuOffload, "pre_forward", lambda *a, **k: calls.append(1) or before(*a, **k)
    )  # fmt: skip
    operator, y = problem
    pipe = PosteriorPipeline.from_pretrained(folder)
    expected = pipe.mean(y, operator, 0.05)
    pipe.enable_model_cpu_offload(device="cpu")  # any device has the same hooks
    torch.testing.assert_close(pipe.mean(y, operator, 0.05), expected)
    assert len(calls) == 1
    pipe(y, operator, 0.05, 3)
    assert len(calls) == 4


def test_bad_calls_say_what_to_do(tiny: Path, problem: tuple[Any, Tensor], tmp_path: Path) -> None:
    """A call that cannot work gives samples of something else, or a traceback from within diffusers."""
    operator, y = problem
    pipe = pipeline(po.load(tiny))
    with pytest.raises(ValueError, match="num_samples=0"):
        pipe(y, operator, 0.05, num_samples=0)
    with pytest.raises(ValueError, match="latents have shape"):
        pipe(y, operator, 0.05, latents=torch.zeros(2, 3, 16, 24))
    with pytest.raises(ValueError, match="3 generators do not fit 1 samples of 2"):
        pipe(y, operator, 0.05, generator=[torch.Generator()] * 3)
    with pytest.raises(ValueError, match="'pt', 'np' or 'pil'"):
        pipe(y, operator, 0.05, output_type="latent")
    with pytest.raises(ValueError, match="not pictures"):
        pipeline()(Y, A, SIGMA_Y, output_type="pil")
    pipe.scheduler = diffusers.LCMScheduler()
    with pytest.raises(ValueError, match=r"LCMScheduler is not among .* DDIMScheduler"):
        pipe(y, operator, 0.05)
    pipe.scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="learned variance"):
        pipe(y, operator, 0.05)
    with pytest.raises(ValueError, match="no card"):
        pipeline().save_pretrained(tmp_path / "gaussian")


def test_command_writes_a_whole_folder_or_nothing(tiny: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """A failed export leaves half a model, replaces something of the user's, or ends in a traceback."""
    out = tmp_path / "deep" / "out"
    (tiny / "ATTRIBUTION.csv").write_text("photo,author")
    assert run(["export", str(tiny), "-o", str(out), "--scheduler", "flow-euler"]) == 0
    assert json.loads((out / "model_index.json").read_text())["scheduler"][1] == "FlowMatchEulerDiscreteScheduler"
    assert (out / "denoiser" / "diffusion_pytorch_model.safetensors").stat().st_mode & 0o044
    assert (out / "ATTRIBUTION.csv").read_text() == "photo,author"
    assert "sigma_y from 0.01 to 0.2" in (out / "README.md").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for words, expected in (
        (["nowhere", "-o", str(tmp_path / "a")], "no model 'nowhere'"),
        ([str(tiny), "-o", str(tmp_path / "mine")], "not an empty folder"),
        ([str(tiny), "-o", str(tmp_path / "b"), "--scheduler", "lcm"], "choose one of dpm++"),
    ):
        assert run(["export", *words]) == 2
        assert expected in capsys.readouterr().err
    monkeypatch.setattr(PosteriorPipeline, "save_config", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    assert run(["export", str(tiny), "-o", str(tmp_path / "c")]) == 2
    assert "full" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "mine"]
