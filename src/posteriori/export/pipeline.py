"""A trained denoiser as a diffusers pipeline: saved, loaded, moved and sampled as diffusers' own are."""

# Annotations stay objects: diffusers up to 0.35 reads those of a pipeline's __init__ and cannot read strings.
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from posteriori.checkpoint import build_denoiser, describe
from posteriori.denoise import Denoiser, NetworkDenoiser, Posterior
from posteriori.export.schedulers import check_scheduler, prediction, scales
from posteriori.images import to_picture
from posteriori.operators.base import LinearOperator, Scalar
from posteriori.pivot import sample_generator
from posteriori.posterior import ExactPosterior

__all__ = ["DenoiserModel", "PosteriorOutput", "PosteriorPipeline"]

# diffusers looks for the class of a pipeline that is not its own in a file of the folder.
CODE_FILE = "pipeline"
CODE = '''"""The class of this pipeline, for diffusers. It needs the package: pip install posteriori"""

from posteriori.export import PosteriorPipeline

__all__ = ["PosteriorPipeline"]
'''

Generators = torch.Generator | Sequence[torch.Generator] | None


class DenoiserModel(Denoiser, ModelMixin, ConfigMixin):
    """A denoiser as a model of diffusers: ``config.json`` holds its card, beside safetensors.

    Args:
        card: what the denoiser is made from again, and all else there is to know of it.
        denoiser: the denoiser itself; from the card when left out. Without a card it can be sampled, not saved.

    In half precision only the network is; signals and solves stay in float32.
    """

    config_name = "config.json"
    ignore_for_config = ["denoiser"]  # noqa: RUF012
    warm = True

    @register_to_config
    def __init__(self, card: dict[str, Any] | None = None, denoiser: Denoiser | None = None) -> None:
        super().__init__()
        if denoiser is None:
            if card is None:
                raise ValueError("need a card or a denoiser")
            denoiser = build_denoiser(dict(card))
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.stand_for(denoiser)

    @property
    def card(self) -> dict[str, Any] | None:
        """What the model is, was trained on and knows."""
        return cast("Any", self).config["card"]

    def known(
        self, y: Tensor, A: LinearOperator, shape: tuple[int, ...], sigma_y: Scalar
    ) -> tuple[Tensor | None, Tensor | None]:
        with self._precision(y):
            return self.denoiser.known(y, A, shape, sigma_y)

    def forward(
        self,
        x_t: Tensor,
        t: Scalar,
        A: LinearOperator,
        y: Tensor,
        sigma_y: Scalar,
        previous: Posterior | None = None,
    ) -> Posterior:
        with self._precision(x_t):
            return self.denoiser(x_t, t, A, y, sigma_y, previous=previous)

    def _precision(self, like: Tensor) -> torch.autocast:
        dtype: torch.dtype = cast("Any", self).dtype
        return torch.autocast(like.device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16))

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        if self.card is None:
            raise ValueError(f"no card describes this {type(self.denoiser).__name__}, so it could not be loaded again")
        with torch.device("meta"):
            build_denoiser(dict(self.card))  # raises where the card needs a network of the user's
        super().save_pretrained(save_directory, *args, **kwargs)


def _card_of(denoiser: Denoiser) -> dict[str, Any] | None:
    """What the denoiser's card says and it is now; of the file that it came from only the content."""
    if not isinstance(denoiser, NetworkDenoiser):
        return None
    try:
        stated = {**(getattr(denoiser, "card", None) or {}), **describe(denoiser)}
    except ValueError:  # its network does not say how it is made
        return None
    return {k: v for k, v in stated.items() if k not in ("format", "sha256")}


@dataclass
class PosteriorOutput(BaseOutput):
    """Samples of ``p(x_0 | y)``.

    Attributes:
        images: ``(num_samples, B, *signal)`` in the units of the measurement ([-1, 1] for images) as a tensor or an
            array; or a list of ``num_samples * B`` pictures, those of the first sample of every measurement first.
    """

    images: Tensor | np.ndarray[Any, Any] | list[Image.Image]


class PosteriorPipeline(DiffusionPipeline):
    """Posterior samples of linear inverse problems by any of diffusers' schedulers.

    Args:
        denoiser: a :class:`DenoiserModel`, or any denoiser of posteriori.
        scheduler: one of :data:`posteriori.export.SCHEDULERS`; replaced by assignment, as everywhere in diffusers:
            ``pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)``.
    """

    model_cpu_offload_seq = "denoiser"

    def __init__(self, denoiser: Denoiser, scheduler: SchedulerMixin) -> None:
        super().__init__()
        if not isinstance(denoiser, DenoiserModel):
            denoiser = DenoiserModel(_card_of(denoiser), denoiser)
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        y: Tensor,
        A: LinearOperator,
        sigma_y: Scalar,
        num_inference_steps: int = 20,
        num_samples: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: Literal["pt", "np", "pil"] = "pil",
        return_dict: bool = True,
    ) -> PosteriorOutput | tuple[Any]:
        """Draw posterior samples.

        Args:
            y: measurements ``(B, *measurement)`` of images in [-1, 1], or of any signals.
            A: the operator they were made with.
            sigma_y: standard deviation of their noise, in their units; one number or one per measurement ``(B,)``.
            num_inference_steps: steps of the scheduler, each of one evaluation of the network (Heun's: of two).
            num_samples: samples of each measurement.
            generator: its next number seeds all noise; sample ``k`` of measurement ``b`` has a stream of its own, so
                that neither ``num_samples`` nor the batch changes it. Or one generator for every sample, sample-major.
            latents: standard normal noise to start from, ``(num_samples, B, *signal)``, instead of drawing it.
            output_type: ``"pil"`` for pictures, ``"pt"`` or ``"np"`` for signals in the units of the measurement.
            return_dict: a :class:`PosteriorOutput`, or a tuple of its one entry.

        Raises:
            ValueError: when an argument does not fit, or the scheduler is not known to work.
        """
        if num_samples < 1 or num_inference_steps < 1:
            raise ValueError(
                f"need at least 1 sample and 1 step, got num_samples={num_samples} and "
                f"num_inference_steps={num_inference_steps}"
            )
        if output_type not in ("pt", "np", "pil"):
            raise ValueError(f"unknown output_type {output_type!r}: choose 'pt', 'np' or 'pil'")
        check_scheduler(self.scheduler)
        problem = self._problem(y, A, sigma_y)
        batch, signal = problem.shape[0], problem.shape[1:]
        if output_type == "pil" and (len(signal) != 3 or signal[0] not in (1, 3)):
            raise ValueError(f"signals of shape {tuple(signal)} are not pictures: use output_type='pt'")
        generators = _generators(generator, num_samples, batch)
        if latents is not None and latents.shape != (num_samples, *problem.shape):
            raise ValueError(f"latents have shape {tuple(latents.shape)}, not {(num_samples, *problem.shape)}")

        # an operator with parameters of its own for every measurement cannot be repeated: one sample at a time
        at_once = 1 if A.samples(len(problem.shape)) is not None else num_samples
        parts = []
        with self.progress_bar(total=num_inference_steps * num_samples // at_once) as bar:
            for start in range(0, num_samples, at_once):
                own = generators[start * batch : (start + at_once) * batch]
                if latents is None:
                    rows = [torch.randn(signal, generator=g, dtype=problem.y.dtype, device=g.device) for g in own]
                    noise = torch.stack(rows).to(problem.y)
                else:
                    noise = latents[start : start + at_once].flatten(0, 1).to(problem.y)
                parts.append(self._sample(problem.expand(at_once) if at_once > 1 else problem, noise, own,
                                          num_inference_steps, bar))  # fmt: skip
        x = torch.cat(parts).unflatten(0, (num_samples, batch))
        self.maybe_free_model_hooks()
        images: Any = x
        if output_type == "np":
            images = x.cpu().numpy()
        elif output_type == "pil":
            images = [to_picture(image) for image in x.flatten(0, 1)]
        return PosteriorOutput(images) if return_dict else (images,)

    @torch.no_grad()
    def mean(self, y: Tensor, A: LinearOperator, sigma_y: Scalar) -> Tensor:
        """``E[x_0 | y]`` by one evaluation of the network, or two, ``(B, *signal)``; arguments as for samples."""
        mean = self._problem(y, A, sigma_y).mean()
        self.maybe_free_model_hooks()
        return mean

    def _problem(self, y: Tensor, A: LinearOperator, sigma_y: Scalar) -> ExactPosterior:
        y = y.to(self._execution_device)
        return ExactPosterior(self.denoiser, A, y if y.dtype == torch.float64 else y.float(), sigma_y)

    def _sample(
        self, posterior: ExactPosterior, noise: Tensor, generators: list[torch.Generator], steps: int, bar: Any
    ) -> Tensor:
        """One pass of the scheduler's loop, as every pipeline of diffusers writes it."""
        scheduler = self.scheduler
        scheduler.set_timesteps(steps, device=noise.device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # two rounded timesteps may be equal: steps are counted, not looked up
        random = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
        known: Posterior | None = None
        for i, t in enumerate(scheduler.timesteps):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)  # keeps the scheduler's books; the denoiser needs no scaled input
            known = posterior.denoise_at(x, *scales(scheduler, t), known)
            x = scheduler.step(prediction(scheduler, known), t, x, **random).prev_sample.to(noise)
            if i + 1 == len(scheduler.timesteps) or (i + 1) % scheduler.order == 0:
                bar.update()
        return x

    def save_config(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write ``model_index.json``, and beside it the file that leads ``DiffusionPipeline`` to this class."""
        super().save_config(save_directory, *args, **kwargs)
        index = Path(save_directory) / self.config_name
        content = {**json.loads(index.read_text()), "_class_name": [CODE_FILE, type(self).__name__]}
        index.write_text(json.dumps(content, indent=2) + "\n")
        (Path(save_directory) / f"{CODE_FILE}.py").write_text(CODE)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # who asks this class to load has it, and need not trust the folder's file that imports it
        content = super()._dict_from_json_file(json_file, *args, **kwargs)
        return {**content, "_class_name": cls.__name__} if Path(json_file).name == cls.config_name else content


def _generators(generator: Generators, num_samples: int, batch: int) -> list[torch.Generator]:
    """One generator for every sample, sample-major."""
    if isinstance(generator, Sequence):
        if len(generator) != num_samples * batch:
            raise ValueError(f"{len(generator)} generators do not fit {num_samples} samples of {batch} measurements")
        return list(generator)
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    return [sample_generator(seed, b, k) for k in range(num_samples) for b in range(batch)]
