r"""deepinv: its physics as operators, and exact posterior sampling as one of its reconstructors.

deepinv's images are ``z`` in [0, 1], ours ``x = 2 z - 1``. With its measurement ``v = A z + s noise``,

    y = 2 v - A 1 = A x + 2 s noise:      the same A, sigma_y = 2 s, and the result goes back as z = (x + 1)/2.

A physics is matched with a structure that has an exact solve, and the match is kept only where both give the same
measurement of a random image; any other physics is used through its ``A`` and ``A_adjoint``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable as Function
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from posteriori.denoise import Denoiser
from posteriori.operators import (
    MRI,
    Blur,
    Callable,
    ChannelMixing,
    Downsampling,
    Hadamard,
    Identity,
    Inpainting,
    KrylovOperator,
    LinearOperator,
    Matrix,
    MultiCoilMRI,
    Weighting,
)
from posteriori.operators.algebra import Permuted
from posteriori.operators.kronecker import Boundary
from posteriori.posterior import ExactPosterior
from posteriori.sample import sample

__all__ = ["from_deepinv", "to_deepinv"]

_BOUNDARIES: dict[str, Boundary] = {
    "circular": "circular", "reflect": "reflect", "replicate": "replicate", "zeros": "zero", "constant": "zero",
    "valid": "valid",
}  # fmt: skip


def from_deepinv(physics: Any, shape: Sequence[int], **options: Any) -> LinearOperator:
    """The linear operator of a deepinv ``LinearPhysics``, as it is now: later updates of the physics do not reach it.

    Args:
        physics: ``deepinv.physics.LinearPhysics`` with measurements that are one real tensor.
        shape: shape of an image without the batch, such as ``(3, 64, 64)``.
        **options: of :class:`posteriori.operators.Callable` (tolerance, max_iterations, ...), for those that are not
            solved exactly.

    Returns:
        An operator with an exact solve for denoising, inpainting, demosaicing, blur, downsampling, grayscale,
        single-coil MRI, the fast single-pixel camera and random matrices where ours is the same map, else one that
        solves by conjugate gradients; ``A.solver`` tells. Several coils are ours. Tomography is deepinv's own: it turns
        the image and adds up rows, where ours interpolates along rays. Noise and units are not part of it: see the
        module's head.

    Raises:
        ValueError: when the physics is not linear, gives no real tensor, or does not take ``shape``.
    """
    from deepinv.physics import LinearPhysics

    name = type(physics).__name__
    if not isinstance(physics, LinearPhysics):
        raise ValueError(f"{name} is not a linear physics of deepinv: only linear measurements have a pivot")
    frozen = copy.deepcopy(physics).requires_grad_(False)
    batch = next((len(b) for b in frozen.buffers() if b.ndim == len(shape) + 1 and len(b) > 1), 1)
    generator = torch.Generator().manual_seed(0)
    device = next((b.device for b in frozen.buffers()), torch.device("cpu"))
    x = torch.rand(batch, *shape, generator=generator).to(device)
    try:
        y = frozen.A(x)
    except Exception as error:
        raise ValueError(f"{name} does not take images of shape {tuple(shape)}: {error}") from None
    if not isinstance(y, Tensor) or y.is_complex():
        raise ValueError(f"{name} does not measure one real tensor: convert its parts one by one")
    for candidate in _candidates(frozen, shape):
        try:
            same = _same(candidate(), x, y)
        except (ValueError, RuntimeError):  # a kernel larger than the image, say
            continue
        if same:
            A = candidate()
            inner = A.operator if isinstance(A, Permuted) else A
            if isinstance(inner, KrylovOperator):
                for name in ("tolerance", "max_iterations", "dense_entries"):
                    setattr(inner, name, options.get(name, getattr(inner, name)))
            return A
    return _through_functions(frozen, tuple(shape), x, y, options)


def _same(A: LinearOperator, x: Tensor, y: Tensor) -> bool:
    ours = A(x)
    return ours.shape == y.shape and float((ours - y).norm()) <= 1e-5 * float(y.norm())


def _candidates(physics: Any, shape: Sequence[int]) -> Iterator[Function[[], LinearOperator]]:
    """Operators that a physics may be. Which entry of an even kernel is its centre is tried out."""
    from deepinv import physics as deepinv_physics

    if isinstance(physics, deepinv_physics.Denoising):
        yield Identity
    elif isinstance(physics, deepinv_physics.Inpainting):
        mask = physics.mask.squeeze(0) if len(physics.mask) == 1 else physics.mask
        yield partial(Inpainting, mask)
        yield partial(Weighting, mask)
    elif isinstance(physics, (deepinv_physics.Blur, deepinv_physics.BlurFFT)):
        padding = getattr(physics, "padding", "circular")
        kernels = _one_channel(physics.filter)
        if kernels is not None and padding in _BOUNDARIES:
            for kernel in (kernels, *[functional.pad(kernels, p) for p in _fronts(kernels)]):
                one = len(kernel) == 1
                yield partial(Blur, kernel[0] if one else kernel, _BOUNDARIES[padding], per_sample=not one)
    elif isinstance(physics, deepinv_physics.Downsampling):
        kernels = torch.ones(1, 1, 1) if physics.filter is None else _one_channel(physics.filter)
        boundary, factor = _BOUNDARIES.get(physics.padding), physics.factor
        if kernels is not None and len(kernels) == 1 and boundary:
            shifted = [_on_first_pixel(kernels[0], factor, early) for early in (0, 1)]
            for kernel in kernels if boundary == "valid" else shifted:
                yield partial(Downsampling, factor, kernel, boundary)
    elif isinstance(physics, deepinv_physics.Decolorize):
        yield partial(ChannelMixing, physics.srf.reshape(1, -1), "Grayscale")
    elif isinstance(physics, deepinv_physics.MRI) and physics.mask.ndim == 4:
        yield partial(MRI, physics.mask[:, 0])
    elif isinstance(physics, deepinv_physics.MultiCoilMRI) and not physics.three_d:
        # deepinv has real and imaginary part before the coils
        yield lambda: Permuted((1, 0, 2, 3), MultiCoilMRI(physics.mask[:, 0], physics.coil_maps))
    elif isinstance(physics, deepinv_physics.SinglePixelCamera) and physics.fast:
        yield partial(Hadamard, physics.mask.squeeze(0))
    elif isinstance(physics, deepinv_physics.CompressedSensing) and not physics.channelwise:
        yield partial(Matrix, physics._A, tuple(shape))


def _one_channel(kernel: Tensor | None) -> Tensor | None:
    """Kernels ``(B, kh, kw)`` from ``(B, C, kh, kw)`` where all channels have the same."""
    if kernel is None or kernel.ndim != 4 or not bool((kernel == kernel[:, :1]).all()):
        return None
    return kernel[:, 0]


def _fronts(kernels: Tensor) -> list[tuple[int, ...]]:
    """Paddings that move the centre of even kernels by one entry: a row and column of zeros in front."""
    kh, kw = kernels.shape[-2:]
    left, top = 1 - kw % 2, 1 - kh % 2
    return [(left, 0, top, 0)] if left or top else []


def _on_first_pixel(kernel: Tensor, factor: int, early: int) -> Tensor:
    """A kernel centred on the first pixel of every block, padded with zeros until :func:`Downsampling`, which centres
    kernels on blocks, puts it there. ``early``: the centre of an even kernel is the entry before the middle."""
    # A kernel of k entries reaches from -(k - 1 - centre) on; one of length L is put at (factor - L) // 2.
    fronts = [factor + k - 2 - 2 * ((k - early) // 2) for k in kernel.shape]
    top, left = fronts
    return functional.pad(kernel, (max(left, 0), max(-left, 0), max(top, 0), max(-top, 0)))


def _through_functions(
    physics: Any, shape: tuple[int, ...], x: Tensor, y: Tensor, options: dict[str, Any]
) -> LinearOperator:
    """The physics through its own functions, in float64 where it can."""
    copies = {torch.float32: physics}
    try:
        double = copy.deepcopy(physics).double()
        found = double.A(x.double())
        if found.dtype != torch.float64 or double.A_adjoint(found).dtype != torch.float64 or not _close(found, y):
            raise RuntimeError
        copies[torch.float64] = double
    except Exception:  # whatever a physics written for float32 does in float64
        options = {"dtype": torch.float32, **options}

    def run(name: str, v: Tensor) -> Tensor:
        p = copies.get(v.dtype)
        if p is None:
            return run(name, v.float()).to(v)
        own = next(p.buffers(), v)
        p = p if own.device == v.device else copy.deepcopy(p).to(v.device)
        result: Tensor = getattr(p, name)(v)
        return result

    def forward(v: Tensor) -> Tensor:
        return run("A", v)

    def adjoint(v: Tensor) -> Tensor:
        return run("A_adjoint", v)

    back = adjoint(y)
    scale = float(y.square().sum())
    if back.shape == x.shape and abs(float((x * back).sum()) - scale) <= 1e-4 * scale:
        return Callable(forward, adjoint, shape=shape, **options)
    warnings.warn(
        f"A_adjoint of {type(physics).__name__} is not the transpose of its A: using automatic differentiation instead",
        RuntimeWarning,
        stacklevel=3,
    )
    return Callable(forward, shape=shape, **options)


def _close(u: Tensor, v: Tensor) -> bool:
    return u.shape == v.shape and float((u - v).norm()) <= 1e-4 * float(v.norm())


def _sigma(physics: Any) -> Tensor:
    """Noise level in deepinv's units, a 0-d tensor or one per sample."""
    from deepinv.physics import GaussianNoise, ZeroNoise

    model = physics.noise_model
    if isinstance(model, ZeroNoise):
        return torch.zeros(())
    if not isinstance(model, GaussianNoise):
        raise ValueError(
            f"exact posterior sampling is for Gaussian noise, this physics has {type(model).__name__}: "
            "give it noise_model=GaussianNoise(sigma) with the nearest level"
        )
    return torch.as_tensor(model.sigma).detach().flatten() if model.sigma.numel() > 1 else model.sigma.detach().mean()


def to_deepinv(denoiser: Denoiser, nfe: int | Literal["mean"] = "mean", *, seed: int = 0) -> Any:
    """Exact posterior sampling as a ``deepinv.models.Reconstructor``.

    ``model(y, physics)`` takes deepinv's measurement and physics (images in [0, 1], the noise level is
    ``physics.noise_model.sigma``) and gives images in its units, ``(B, C, H, W)``.

    Args:
        denoiser: such as ``po.load("photo")``.
        nfe: ``"mean"`` for the posterior mean by one network evaluation, or the evaluations of one posterior sample.
        seed: of the sample.

    Raises:
        ValueError: (when called) on noise that is not Gaussian, on a physics that is not linear, and as
            :class:`~posteriori.posterior.ExactPosterior`.
    """
    from deepinv.models import Reconstructor

    class ExactPosteriorReconstructor(Reconstructor):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser, self.nfe, self.seed = denoiser, nfe, seed

        def forward(self, y: Tensor, physics: Any, **kwargs: Any) -> Tensor:
            A = from_deepinv(physics, tuple(physics.A_adjoint(y).shape[1:]))
            return restore(A, y, _sigma(physics))

    def restore(A: LinearOperator, v: Tensor, sigma: Tensor) -> Tensor:
        ones = v.new_ones(v.shape[0], *A.signal_shape(v.shape[1:]))
        posterior = ExactPosterior(denoiser, A, 2 * v - A(ones), 2 * sigma.double())
        x = posterior.mean(seed) if nfe == "mean" else sample(posterior, n=1, nfe=nfe, seed=seed)[0]
        return (x + 1) / 2

    return ExactPosteriorReconstructor()
