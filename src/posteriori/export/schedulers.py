r"""diffusers' schedulers: what they mean by a noisy signal, and what they ask of a model.

A scheduler steps ``x = alpha x_0 + sigma noise`` and is told one of

    sample           x_0
    epsilon          noise
    v_prediction     (alpha noise - sigma x_0) / sqrt(alpha^2 + sigma^2)
    flow             noise - x_0
    EDM              F = (x_0 - c_skip x) / c_out

Each is affine in ``x_0`` given ``x``, so its expectation follows from ``E[x_0 | x, y]``. Nothing of a scheduler is
written again here: its scales are what its own forward process (``add_noise``, ``scale_noise``) makes of the pairs
(1, 0) and (0, 1), and EDM's ``c_skip``, ``c_out`` what its ``precondition_outputs`` makes of them.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor

from posteriori.denoise import Posterior

__all__ = ["SCHEDULERS", "check_scheduler", "make_scheduler", "prediction", "scales"]

#: The schedulers whose samples the tests compare with an exact posterior. Some others evaluate their model at noise
#: that their forward process does not tell (KDPM2), or are made for distilled models (LCM, TCD).
SCHEDULERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "edm-euler": "EDMEulerScheduler",
    "edm-dpm++": "EDMDPMSolverMultistepScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
}

#: What ``X.from_config(pipe.scheduler.config)`` hands on to every scheduler that knows the setting. Any range of noise
#: will do, since the denoiser transfers; clipping would be wrong for signals that are not within [-1, 1].
SETTINGS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "use_karras_sigmas": True,
    "clip_sample": False,
}


def make_scheduler(name: str = "dpm++") -> Any:
    """A scheduler by its short name, one of :data:`SCHEDULERS`, with settings that suit any denoiser.

    Raises:
        ValueError: on an unknown name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}: choose one of {', '.join(SCHEDULERS)}")
    kind = getattr(diffusers, SCHEDULERS[name])
    known = inspect.signature(kind.__init__).parameters
    scheduler = kind(**{k: v for k, v in SETTINGS.items() if k in known})
    if "beta_schedule" in known:
        scheduler.register_to_config(**SETTINGS)  # this family keeps, and hands on, what only its other members know
    return scheduler


def check_scheduler(scheduler: Any) -> None:
    """Raise ValueError when the scheduler is not known to sample the right distribution."""
    if not any(c.__name__ in SCHEDULERS.values() for c in type(scheduler).__mro__):
        raise ValueError(
            f"{type(scheduler).__name__} is not among the schedulers known to work: choose one of "
            f"{', '.join(SCHEDULERS.values())}"
        )
    if str(scheduler.config.get("variance_type", "")).startswith("learned"):
        raise ValueError("the scheduler wants a learned variance, which a denoiser has not: set variance_type")


def scales(scheduler: Any, t: Tensor) -> tuple[float, float]:
    """``(alpha, sigma)`` of the signal that the scheduler holds when its loop reaches timestep ``t``."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    t = t.cpu().reshape(1)
    if hasattr(scheduler, "scale_noise"):
        alpha, sigma = scheduler.scale_noise(one, t, zero), scheduler.scale_noise(zero, t, one)
    else:
        alpha, sigma = scheduler.add_noise(one, zero, t), scheduler.add_noise(zero, one, t)
    return float(alpha), float(sigma)


def prediction(scheduler: Any, known: Posterior) -> Tensor:
    """What the scheduler is to be told of ``known``, the posterior at its own signal and scales."""
    x, mean, alpha, sigma = known.x_t, known.mean, known.alpha_t, known.sigma_t
    if hasattr(scheduler, "precondition_outputs"):
        skip = scheduler.precondition_outputs(x, torch.zeros_like(x), sigma)
        out = scheduler.precondition_outputs(torch.zeros_like(x), torch.ones_like(x), sigma)
        return (mean - skip) / out
    kind = "flow_prediction" if hasattr(scheduler, "scale_noise") else scheduler.config.prediction_type
    match kind:
        case "epsilon":
            return known.noise
        case "sample":
            return mean
        case "v_prediction":
            return (alpha * known.noise - sigma * mean) / (alpha**2 + sigma**2).sqrt()
        case "flow_prediction":
            return known.noise - mean
    raise ValueError(f"unknown prediction_type {kind!r}: choose epsilon, sample or v_prediction")
