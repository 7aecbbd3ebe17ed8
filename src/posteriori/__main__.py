"""``python -m posteriori``."""

from posteriori.cli import main

main()
