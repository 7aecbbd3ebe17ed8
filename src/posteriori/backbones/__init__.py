"""Networks that a :class:`posteriori.NetworkDenoiser` can wrap."""
