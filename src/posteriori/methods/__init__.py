"""Restoration methods to compare with, one short file each."""
