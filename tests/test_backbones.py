"""Pretrained models of diffusers: with nothing measured they are what they were, in every preconditioning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor, nn

import posteriori as po
from posteriori.backbones import load_pretrained, with_labels
from posteriori.operators import Nothing

FORMS = ["spectral", "scalar", "paper", "palette"]
SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that matter: some classes start with layers at zero, behind which nothing would be tested."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return network.eval()


def unet(**config: Any) -> UNet2DModel:
    return randomise(UNet2DModel(**{"in_channels": 3, "out_channels": 3, "sample_size": 16, **SMALL, **config}))


def noisy(alpha: Tensor, sigma: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.rand(len(alpha), 3, 16, 16, generator=generator) * 2 - 1
    noise = torch.randn(x_0.shape, generator=generator)
    return alpha.reshape(-1, 1, 1, 1).float() * x_0 + sigma.reshape(-1, 1, 1, 1).float() * noise


def error_of(denoiser: po.NetworkDenoiser, x_t: Tensor, t: Tensor, expected: Tensor) -> float:
    """Largest difference from the original in any preconditioning. The original's own output is multiplied by the
    noise, so that is the unit where the noise is above 1."""
    scale = denoiser.schedule.ratio(t).clamp(min=1).reshape(-1, *[1] * (x_t.ndim - 1))
    errors = []
    for form in FORMS:
        denoiser.preconditioning = form  # type: ignore[assignment]
        mean = denoiser(x_t, t, Nothing(), torch.zeros_like(x_t), 0.05).mean
        errors.append(float(((mean - expected) / scale).abs().max()))
    figures = ", ".join(f"{form} {error:.1e}" for form, error in zip(FORMS, errors, strict=True))
    network = getattr(denoiser.backbone, "network", denoiser.backbone)
    print(f"A = 0: {type(network).__name__}, {denoiser.scaling.kind}: {figures}")  # noqa: T201
    return max(errors)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler], ids=lambda s: s.__name__)
@torch.no_grad()
def test_ddpm_pipelines(scheduler: Any, prediction: str, tmp_path: Path) -> None:
    """A pipeline taken over would be another model; the oracle is what its own scheduler makes of the network."""
    own = scheduler(prediction_type=prediction, clip_sample=prediction == "epsilon")
    network = unet()
    pipeline = DDPMPipeline if scheduler is DDPMScheduler else DDIMPipeline
    pipeline(network, own).save_pretrained(tmp_path)
    denoiser = load_pretrained(tmp_path)
    own.set_timesteps(1000)
    steps = torch.tensor([0, 1, 250, 700, 999])
    a = own.alphas_cumprod[steps]
    x_t = noisy(a.sqrt(), (1 - a).sqrt())
    rows = [
        own.step(network(x, i).sample, int(i), x).pred_original_sample for i, x in zip(steps, x_t.split(1), strict=True)
    ]
    t = (steps.double() + 1) / 1000
    assert error_of(denoiser, x_t, t, torch.cat(rows)) < 2e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_edm_pipelines(prediction: str, tmp_path: Path) -> None:
    """EDM's scalars, or the sign of its v-prediction, taken over wrongly."""
    own = EDMEulerScheduler(prediction_type=prediction, sigma_data=0.6)
    network = unet()
    DDPMPipeline(network, own).save_pretrained(tmp_path)
    denoiser = load_pretrained(tmp_path)
    q = torch.tensor([0.002, 0.3, 2.0, 80.0], dtype=torch.float64)
    x_t = noisy(torch.ones_like(q), q)
    rows = []
    for sigma, x in zip(q, x_t.split(1), strict=True):
        f = network(own.precondition_inputs(x, sigma.float()), own.precondition_noise(sigma)).sample
        rows.append(own.precondition_outputs(x, f, sigma.float()))
    assert error_of(denoiser, x_t, q, torch.cat(rows)) < 2e-5


@torch.no_grad()
def test_flow_matching(tmp_path: Path) -> None:
    """diffusers' flows predict noise - x_0 and are told 1000 t; the step to noise 0 is x_0."""
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    network = unet()
    network.save_pretrained(tmp_path / "unet")
    own.save_pretrained(tmp_path / "scheduler")
    denoiser = load_pretrained(tmp_path)
    t = torch.tensor([0.001, 0.3, 0.8, 0.999], dtype=torch.float64)
    x_t = noisy(1 - t, t)
    rows = []
    for sigma, x in zip(t, x_t.split(1), strict=True):
        own.set_timesteps(sigmas=[float(sigma) / (3 - 2 * float(sigma))])  # what shift=3 maps to sigma
        (label,) = own.timesteps
        rows.append(own.step(network(x, label[None]).sample, label, x).prev_sample)
    assert error_of(denoiser, x_t, t, torch.cat(rows)) < 2e-5


class TinyNet(nn.Module):
    """A user's own network: two convolutions, an embedding of the noise, and of the class."""

    def __init__(self, channels: int = 3, classes: int = 0, outputs: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.embed = nn.Linear(2, 8)
        self.classes = nn.Linear(classes, 8) if classes else None
        self.head = nn.Conv2d(8, channels * outputs, 3, padding=1)

    def forward(self, x: Tensor, label: Tensor, y: Tensor | None = None) -> Tensor:
        label = label.to(x.dtype) / 100
        h = self.embed(torch.stack([label.cos(), label.sin()], 1))
        h = h if self.classes is None else h + self.classes(y)
        return self.head(torch.tanh(self.stem(x) + h[:, :, None, None]))


class Preconditioned(nn.Module):
    """EDM's own form: ``D(x, sigma)`` around a network."""

    def __init__(self, network: nn.Module, s: float) -> None:
        super().__init__()
        self.network, self.s = network, s

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        q, s = sigma.reshape(-1, 1, 1, 1), self.s
        f = self.network(x / (q**2 + s**2).sqrt(), sigma.log() / 4, y)
        return s**2 / (q**2 + s**2) * x + q * s / (q**2 + s**2).sqrt() * f


QS = torch.tensor([0.002, 0.3, 2.0, 80.0], dtype=torch.float64)


@torch.no_grad()
def test_a_network_that_returns_the_image() -> None:
    """``net(x, sigma) -> D`` is recovered through EDM's scalars, also from one trained on images in [0, 1]."""
    network = Preconditioned(randomise(TinyNet()), 0.7)
    x_t = noisy(torch.ones_like(QS), QS)
    denoiser = load_pretrained(network, kind="denoiser", layer="network.stem", embedding="network.embed")
    assert error_of(denoiser, x_t, QS, network(x_t, QS.float())) < 2e-5
    other = load_pretrained(network, kind="denoiser", value_range=(0, 1))
    expected = 2 * network((x_t + 1) / 2, QS.float() / 2) - 1
    assert error_of(other, x_t, QS, expected) < 2e-5


@pytest.mark.parametrize("prediction", ["edm", "epsilon", "v", "flow", "x_0"])
@torch.no_grad()
def test_a_network_of_your_own_that_predicts(prediction: Any) -> None:
    """The network is asked at another scale or label than it was trained at, or its answer taken for another thing."""
    network = randomise(TinyNet(outputs=2))
    flow = prediction == "flow"
    schedule = po.RectifiedFlow() if flow else (po.VE() if prediction == "edm" else po.VP())
    denoiser = load_pretrained(network, kind="network", prediction=prediction, schedule=schedule, data_std=0.6)
    t = schedule.time(torch.tensor([0.01, 0.3, 2.0, 60.0], dtype=torch.float64))
    a, s = (v.reshape(-1, 1, 1, 1).float() for v in (schedule.alpha(t), schedule.sigma(t)))
    x_t = noisy(a.flatten(), s.flatten())
    seen = x_t / (s**2 + 0.36).sqrt() if prediction == "edm" else x_t
    f = network(seen, schedule.ratio(t).log().float() / 4)[:, :3]
    expected = {
        "edm": (0.36 * x_t + s * 0.6 * (s**2 + 0.36).sqrt() * f) / (s**2 + 0.36),
        "epsilon": (x_t - s * f) / a,
        "v": a * x_t - s * f,
        "flow": x_t - s * f,
        "x_0": f,
    }[prediction]
    assert error_of(denoiser, x_t, t, expected) < 2e-5


@torch.no_grad()
def test_labels() -> None:
    """A class-conditional model loses its classes, or the copies of a batch get each other's."""
    network = randomise(TinyNet(classes=5))
    denoiser = load_pretrained(
        Preconditioned(network, 0.5), kind="denoiser", layer="network.stem", classes="y", one_hot=5, labels=[1, 4]
    )
    q = torch.full((4,), 0.7, dtype=torch.float64)
    x_t = noisy(torch.ones_like(q), q)
    wanted = nn.functional.one_hot(torch.tensor([1, 4, 1, 4]), 5).float()
    expected = Preconditioned(network, 0.5)(x_t, q.float(), wanted)
    mean = denoiser(x_t, q, Nothing(), torch.zeros_like(x_t), 0.05).mean
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=0)
    none = with_labels(denoiser, -1)(x_t, q, Nothing(), torch.zeros_like(x_t), 0.05).mean
    expected = Preconditioned(network, 0.5)(x_t, q.float(), torch.zeros(4, 5))
    torch.testing.assert_close(none, expected, atol=1e-5, rtol=0)
    assert denoiser.backbone.labels.tolist() == [1, 4]
    for labels in (5, -2, [0, 7]):
        with pytest.raises(ValueError, match="between -1 and 4"):
            with_labels(denoiser, labels)
    for labels in (0.5, "cat", [[1]], []):
        with pytest.raises(ValueError, match="whole number"):
            with_labels(denoiser, labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not fit a batch"):
        denoiser(x_t[:3], q[:3], Nothing(), torch.zeros_like(x_t[:3]), 0.05)


@torch.no_grad()
def test_class_conditional_unet() -> None:
    """diffusers' table of classes, and steps that are a table too."""
    network = unet(num_class_embeds=7, time_embedding_type="learned", num_train_timesteps=1000)
    scheduler = DDPMScheduler(clip_sample=False)
    denoiser = load_pretrained(network, scheduler=scheduler, labels=3)
    a = scheduler.alphas_cumprod[[500]]
    x_t = noisy(a.sqrt(), (1 - a).sqrt())
    noise = network(x_t, torch.tensor([500]), torch.tensor([3])).sample
    expected = (x_t - (1 - a).sqrt() * noise) / a.sqrt()
    assert error_of(denoiser, x_t, torch.tensor([0.501], dtype=torch.float64), expected) < 2e-5
    with pytest.raises(ValueError, match="between 0 and 6"):
        load_pretrained(network, scheduler=scheduler, labels=7)
    with pytest.raises(ValueError, match="no classes"):
        load_pretrained(unet(), scheduler=scheduler, labels=7)
    with pytest.raises(ValueError, match="class-conditional"):
        load_pretrained(network, scheduler=scheduler)(x_t, 0.5, Nothing(), x_t, 0.05)


def test_new_inputs_learn() -> None:
    """Zero weights that get no gradient would leave the network blind to the measurement for ever; the image's own
    sides must fit what the first layer makes of them."""
    network = Preconditioned(randomise(TinyNet()), 0.5)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    denoiser = load_pretrained(network, kind="denoiser", layer="network.stem", embedding="network.embed")
    denoiser.requires_grad_(True)
    x_t = noisy(torch.ones_like(QS), QS)
    A = po.operators.Inpainting((torch.rand(16, 16) > 0.5).float())
    denoiser(x_t, QS, A, A(x_t), 0.05).mean.square().sum().backward()
    extra = {name: p.grad for name, p in denoiser.named_parameters() if ".extra." in name}
    assert len(extra) == 2
    assert all(
        bool((g.abs().flatten(2).amax(-1) if g.ndim > 2 else g.abs()).amax(0).gt(0).all()) for g in extra.values()
    )
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_vectors() -> None:
    """Signals that are not images: the first layer is linear and must be named."""
    mlp = nn.Linear(6, 6)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = mlp

        def forward(self, x: Tensor, q: Tensor) -> Tensor:
            return self.first(x) * q[:, None]

    with pytest.raises(ValueError, match="no convolution"):
        load_pretrained(Net(), kind="denoiser")
    denoiser = load_pretrained(Net(), kind="denoiser", layer="first")
    u = torch.randn(4, 6)
    expected = mlp(u) * QS.float()[:, None]
    found = denoiser(u, QS, Nothing(), u, 0.05).mean
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere/at all/x", {}, "no model"),
        (TinyNet(), {}, "kind='denoiser'"),
        (TinyNet(), {"kind": "gan"}, "unknown kind"),
        (TinyNet(), {"kind": "denoiser", "layer": "x"}, "no layer"),
        (TinyNet(), {"kind": "denoiser", "labels": 3}, "classes="),
        (TinyNet(), {"kind": "network", "prediction": "v"}, "schedule"),
        (TinyNet(), {"kind": "denoiser", "depth": 3}, "depth"),
        ({"state_dict": {}}, {"kind": "denoiser"}, "not a network"),
        (TinyNet(), {"kind": "denoiser", "value_range": (1, 0)}, "value_range"),
        (TinyNet(), {"kind": "guided-diffusion", "noise_schedule": "odd"}, "linear or cosine"),
    ],
)
def test_what_cannot_be_taken_over(source: Any, options: dict[str, Any], message: str) -> None:
    """A model that is not understood must be refused in one line that says what to give."""
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(source, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(prediction_type="noise"), "prediction_type"),
        (EDMEulerScheduler(prediction_type="sample"), "prediction_type"),
        (None, "scheduler="),
    ],
)
def test_conventions_that_are_not_known(scheduler: Any, message: str) -> None:
    """A guess would give a model that restores nonsense."""
    with pytest.raises(ValueError, match=message):
        load_pretrained(unet(), scheduler=scheduler)


def test_zero_terminal_noise() -> None:
    """Schedules rescaled to end without any signal would give an infinite noise to start from."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    denoiser = load_pretrained(unet(), scheduler=scheduler)
    top = denoiser.schedule.ratio(torch.tensor(denoiser.schedule.t_max, dtype=torch.float64))
    assert 100 < float(top) <= 200.001


def trained(denoiser: po.NetworkDenoiser) -> po.NetworkDenoiser:
    """As if fine-tuned: the new inputs have weight."""
    randomise(denoiser.backbone, seed=5)
    denoiser.sigma_y_range = (0.01, 0.2)
    return denoiser


def answer(denoiser: po.NetworkDenoiser) -> Tensor:
    A = po.operators.Inpainting((torch.arange(256).reshape(16, 16) % 3 == 0).float())
    x = noisy(torch.ones(4), torch.ones(4), seed=4)
    t = denoiser.schedule.time(torch.tensor([0.02, 0.3, 2.0, 50.0], dtype=torch.float64))
    with torch.no_grad():
        return denoiser(x, t, A, A(x), 0.05).mean


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        EDMEulerScheduler(prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_fine_tuned_pipeline_is_loaded_as_it_was(scheduler: Any, tmp_path: Path) -> None:
    """Label, schedule, sign, classes or clipping lost on the way to disk would restore other pictures."""
    denoiser = trained(load_pretrained(unet(num_class_embeds=4), scheduler=scheduler, labels=[0, 1, 2, 3]))
    po.save(denoiser, tmp_path)
    loaded = po.load(tmp_path)
    assert torch.equal(answer(loaded), answer(denoiser))
    assert loaded.schedule == denoiser.schedule
    assert (loaded.c_noise, loaded.clip, loaded.scaling) == (denoiser.c_noise, denoiser.clip, denoiser.scaling)
    assert len((tmp_path / "model.json").read_text().splitlines()) < 100  # a table of 1000 steps is one line


def test_sampled_on_another_schedule(tmp_path: Path) -> None:
    """A DDPM model sampled on EDM's schedule is still told its own steps, also when it comes back from disk."""
    denoiser = trained(load_pretrained(unet(), scheduler=DDPMScheduler()))
    own = denoiser.c_noise
    denoiser.schedule = po.VE(0.02, 80.0)
    po.save(denoiser, tmp_path)
    loaded = po.load(tmp_path)
    assert loaded.schedule == po.VE(0.02, 80.0)
    assert loaded.c_noise == own
    assert torch.equal(answer(loaded), answer(denoiser))


def test_a_fine_tuned_network_of_your_own(tmp_path: Path) -> None:
    """A card never names code to import: the network is given, everything else is the card's."""
    network = Preconditioned(randomise(TinyNet(classes=5)), 0.5)
    denoiser = trained(
        load_pretrained(
            network, kind="denoiser", layer="network.stem", embedding="network.embed", classes="y", one_hot=5, labels=2
        )
    )
    po.save(denoiser, tmp_path)
    with pytest.raises(ValueError, match=r"load\(\.\.\., network=\.\.\.\)"):
        po.load(tmp_path)
    assert torch.equal(answer(po.load(tmp_path, network=Preconditioned(TinyNet(classes=5), 0.5))), answer(denoiser))
    with pytest.raises(ValueError, match="does not fit its card"):
        po.load(tmp_path, network=Preconditioned(TinyNet(classes=6), 0.5))


def test_the_licence_of_a_base_stays_with_it(tmp_path: Path) -> None:
    """A fine-tuned model would be passed on without the terms of what it was made from."""
    DDPMPipeline(unet(), DDPMScheduler()).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\ntags: [x]\nlicense: cc-by-nc-4.0\n---\n# Faces\n")
    denoiser = load_pretrained(tmp_path / "base")
    card = {"name": "faces", "value_range": [-1, 1], "tasks": {"sr": 1.0}, "training_data": {}}
    po.save(trained(denoiser), tmp_path / "tuned", card)
    assert po.load(tmp_path / "tuned").card["base"]["licence"] == "cc-by-nc-4.0"


def test_a_prior_taken_over_restores_photos(tmp_path: Path) -> None:
    """The command line would refuse a pretrained prior, whose card knows no range of the measurement's noise."""
    from PIL import Image

    from posteriori.cli import run

    po.save(load_pretrained(unet(), scheduler=DDPMScheduler()), tmp_path / "prior")
    Image.new("RGB", (16, 16), (200, 90, 30)).save(tmp_path / "photo.png")
    words = f"restore {tmp_path / 'photo.png'} --degrade --task denoise --sigma-y 0.5 --nfe 1 --samples 1"
    assert run([*words.split(), "--model", str(tmp_path / "prior"), "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "photo" / "report.json").is_file()
