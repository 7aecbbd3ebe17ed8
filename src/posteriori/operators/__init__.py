"""Linear operators with exact solves. See :mod:`posteriori.operators.base` for the protocol."""

from posteriori.operators.base import LinearOperator, SpectralOperator, per_sample
from posteriori.operators.boundaries import BoundaryConvolution
from posteriori.operators.channels import Bayer, ChannelMixing, Grayscale
from posteriori.operators.checking import CheckRow, OperatorCheckError, check, report
from posteriori.operators.convolution import (
    Blur,
    Downsampling,
    GaussianBlur,
    PaddedConvolution,
    gaussian_taps,
    motion_kernel,
)
from posteriori.operators.custom import Callable
from posteriori.operators.decimation import CircularDownsampling
from posteriori.operators.dense import Matrix
from posteriori.operators.diagonal import Identity, Inpainting, Nothing, Weighting
from posteriori.operators.fourier import CircularConvolution
from posteriori.operators.kronecker import Separable
from posteriori.operators.krylov import KrylovOperator
from posteriori.operators.sampling import Sampling

__all__ = [
    "Bayer",
    "Blur",
    "BoundaryConvolution",
    "Callable",
    "ChannelMixing",
    "CheckRow",
    "CircularConvolution",
    "CircularDownsampling",
    "Downsampling",
    "GaussianBlur",
    "Grayscale",
    "Identity",
    "Inpainting",
    "KrylovOperator",
    "LinearOperator",
    "Matrix",
    "Nothing",
    "OperatorCheckError",
    "PaddedConvolution",
    "Sampling",
    "Separable",
    "SpectralOperator",
    "Weighting",
    "check",
    "gaussian_taps",
    "motion_kernel",
    "per_sample",
    "report",
]
