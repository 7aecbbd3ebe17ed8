"""Networks that a :class:`posteriori.NetworkDenoiser` can wrap, and other people's pretrained ones."""

from posteriori.backbones.labels import with_labels
from posteriori.backbones.pretrained import PretrainedError, load_pretrained

__all__ = ["PretrainedError", "load_pretrained", "with_labels"]
