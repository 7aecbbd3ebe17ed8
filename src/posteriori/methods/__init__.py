"""Restoration methods on equal terms, one short file each: ``METHODS[name](posterior, n, nfe, seed)``."""

from posteriori.methods.base import METHODS, Estimate, MethodError, available_methods, get_method

__all__ = ["METHODS", "Estimate", "MethodError", "available_methods", "get_method"]
