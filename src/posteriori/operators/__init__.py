"""Linear operators with exact solves. See :mod:`posteriori.operators.base` for the protocol."""

from posteriori.operators.base import LinearOperator, SpectralOperator, per_sample
from posteriori.operators.boundaries import BoundaryConvolution
from posteriori.operators.channels import Bayer, ChannelMixing, Grayscale
from posteriori.operators.checking import CheckRow, OperatorCheckError, check, report
from posteriori.operators.composition import Composition
from posteriori.operators.convolution import (
    Blur,
    Downsampling,
    GaussianBlur,
    PaddedConvolution,
    gaussian_taps,
    motion_kernel,
)
from posteriori.operators.cropping import Crop, Pad
from posteriori.operators.custom import Callable
from posteriori.operators.decimation import CircularDownsampling
from posteriori.operators.dense import Matrix
from posteriori.operators.diagonal import Identity, Inpainting, Nothing, Weighting
from posteriori.operators.fourier import CircularConvolution
from posteriori.operators.kronecker import Separable
from posteriori.operators.krylov import KrylovOperator, Surrogate
from posteriori.operators.mri import MRI, MultiCoilMRI, birdcage_maps, cartesian_mask, radial_mask
from posteriori.operators.radon import Radon
from posteriori.operators.sampling import Sampling
from posteriori.operators.sparse import SparseMatrix
from posteriori.operators.stack import Stack, stack
from posteriori.operators.transforms import DCT, Hadamard

__all__ = [
    "DCT",
    "MRI",
    "Bayer",
    "Blur",
    "BoundaryConvolution",
    "Callable",
    "ChannelMixing",
    "CheckRow",
    "CircularConvolution",
    "CircularDownsampling",
    "Composition",
    "Crop",
    "Downsampling",
    "GaussianBlur",
    "Grayscale",
    "Hadamard",
    "Identity",
    "Inpainting",
    "KrylovOperator",
    "LinearOperator",
    "Matrix",
    "MultiCoilMRI",
    "Nothing",
    "OperatorCheckError",
    "Pad",
    "PaddedConvolution",
    "Radon",
    "Sampling",
    "Separable",
    "SparseMatrix",
    "SpectralOperator",
    "Stack",
    "Surrogate",
    "Weighting",
    "birdcage_maps",
    "cartesian_mask",
    "check",
    "gaussian_taps",
    "motion_kernel",
    "per_sample",
    "radial_mask",
    "report",
    "stack",
]
