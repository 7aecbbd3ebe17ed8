"""``accelerate launch -m posteriori.train RECIPE.yaml -o RUN``: the command ``posteriori train``, for a launcher."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from posteriori.train import load_recipe, train


def main(arguments: list[str] | None = None) -> int:
    """Train by a recipe; 2 when the input is at fault, with one line that says why."""
    parser = argparse.ArgumentParser(prog="python -m posteriori.train", description="Train a model by a recipe.")
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output")
    parser.add_argument("--threads", type=int, help="CPU threads of a process")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        train(load_recipe(options.recipe, options.set), options.output, resume=options.resume)
    except ValueError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
