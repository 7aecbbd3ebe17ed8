r"""What is measured of restorations of images, one number per image, so that any set of rows can be pooled.

    psnr, ssim, distance     of one sample, averaged over the samples; ``psnr_mean`` of their mean, ``psnr_mmse`` of the
                             estimate from one evaluation; ``distance`` is perceptual, in the feature network's maps
    crps, crps_features      fair CRPS of pixels and of pooled features; the mean absolute error of a point estimate
    mse, mse_mean, mse_mmse  squared errors of one sample, of the samples' mean, of the estimate from one evaluation
    variance                 of the samples, averaged over pixels: its root is the diversity
    residual, measurements   |y - A x|^2 / sigma_y^2 of one sample, and how many entries were measured
    inside_50, width_50      share of pixels inside the samples' central interval, and its mean width; likewise 90

True posterior samples have ``E residual = measurements``, ``E mse = 2 E mse_mmse`` and ``E variance = E mse_mmse``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posteriori.bench.images_problems import Problem
from posteriori.methods.base import Estimate
from posteriori.metrics import coverage, crps, mse, psnr, residual_squares, ssim
from posteriori.perceptual import FeatureNetwork

__all__ = ["LEVELS", "Scores", "feature_scores", "interval_width", "pixel_scores"]

Scores = dict[str, list[float]]
LEVELS = (50, 90)


def interval_width(samples: Tensor, level: float) -> Tensor:
    """Mean width of the interval of :func:`posteriori.metrics.coverage` ``(B,)``."""
    n = len(samples)
    k = min(max(1, round((1 - level) / 2 * (n + 1))), (n + 1) // 2)
    ordered = samples.double().sort(dim=0).values
    return (ordered[n - k] - ordered[k - 1]).flatten(1).mean(1)


def _over_samples(values: list[Tensor]) -> list[float]:
    return [float(v) for v in torch.stack(values).double().mean(0)]


def pixel_scores(estimate: Estimate, answers: Tensor, problem: Problem, sigma_y: float) -> Scores:
    """All but what needs a feature network.

    Args:
        estimate: of a method.
        answers: its samples, or its single answer, ``(n, B, C, H, W)`` on the CPU.
        problem: what was to be restored.
        sigma_y: noise.
    """
    x_0, n = problem.x_0, len(answers)
    found = {
        "psnr": _over_samples([psnr(x, x_0) for x in answers]),
        "ssim": _over_samples([ssim(x, x_0) for x in answers]),
        "mse": _over_samples([mse(x, x_0) for x in answers]),
        "residual": _over_samples([residual_squares(problem.A, x, problem.y, sigma_y) for x in answers]),
        "measurements": [float(c) for c in problem.A.measurement_count(problem.y)],
    }
    if estimate.mmse is not None:
        mmse = estimate.mmse.cpu()
        found |= {"psnr_mmse": psnr(mmse, x_0).tolist(), "mse_mmse": mse(mmse, x_0).tolist()}
    if n == 1:
        return found
    mean = answers.double().mean(0)
    found |= {
        "psnr_mean": psnr(mean, x_0.double()).tolist(),
        "mse_mean": mse(mean, x_0).tolist(),
        "variance": answers.double().var(0).flatten(1).mean(1).tolist(),
        "crps": crps(answers, x_0).tolist(),
    }
    for level in LEVELS:
        inside = [coverage(answers[:, b : b + 1], x_0[b : b + 1], level / 100)[0] for b in range(len(x_0))]
        found |= {f"inside_{level}": inside, f"width_{level}": interval_width(answers, level / 100).tolist()}
    return found


def absolute_error(x: Tensor, x_0: Tensor) -> list[float]:
    """The CRPS of an answer that claims to be certain."""
    return [float(v) for v in (x.double() - x_0.double()).abs().flatten(1).mean(1)]


def feature_scores(
    network: FeatureNetwork, answers: Tensor, x_0: Tensor, certain: bool, device: str
) -> tuple[Scores, Tensor, Tensor]:
    """Scores in the space of features, and the pooled features of samples ``(n, B, F)`` and truths ``(B, F)``.

    Args:
        network: on ``device``.
        answers: ``(n, B, C, H, W)``.
        x_0: ``(B, C, H, W)``.
        certain: whether the method gave one answer as a point estimate.
        device: where the network is.
    """
    truth = x_0.to(device)
    of_truth = network.features(truth).cpu()
    of_samples = torch.stack([network.features(x.to(device)).cpu() for x in answers])
    found = {"distance": _over_samples([network.distance(x.to(device), truth).cpu() for x in answers])}
    if certain:
        found["crps_features"] = absolute_error(of_samples[0], of_truth)
    elif len(answers) > 1:
        found["crps_features"] = crps(of_samples, of_truth).tolist()
    return found, of_samples, of_truth
