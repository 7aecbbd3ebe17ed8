"""Folders that ``DiffusionPipeline.from_pretrained`` reads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from posteriori.checkpoint import CheckpointError, load, locate
from posteriori.denoise import Denoiser
from posteriori.export.pipeline import PosteriorPipeline
from posteriori.export.schedulers import make_scheduler

__all__ = ["export_model", "to_pipeline"]

README = """---
library_name: diffusers
tags: [inverse-problems, posterior-sampling, image-restoration]
---

# {name}

Draws posterior samples of linear inverse problems `y = A x + noise`. It needs `pip install posteriori`.

```python
import posteriori as po
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
images = pipe(y, A, sigma_y=0.05, num_inference_steps=20, num_samples=4).images    # A: one of po.operators
```

Any scheduler of diffusers that posteriori knows may take the place of `pipe.scheduler`.

{facts}
"""


def to_pipeline(denoiser: Denoiser, scheduler: str = "dpm++") -> PosteriorPipeline:
    """A pipeline of a denoiser and a scheduler by its short name, one of :data:`posteriori.export.SCHEDULERS`."""
    return PosteriorPipeline(denoiser, make_scheduler(scheduler))


def export_model(model: str | Path, folder: str | Path, scheduler: str = "dpm++") -> Path:
    """Write a trained model as a folder that ``DiffusionPipeline.from_pretrained`` reads.

    Args:
        model: bundled name, folder or hub id.
        folder: where to; it must be new or empty, and appears only when it is complete.
        scheduler: short name, one of :data:`posteriori.export.SCHEDULERS`.

    Raises:
        CheckpointError: when there is no such model, or the folder is in use or cannot be written.
        ValueError: on an unknown scheduler.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder: choose another, or remove it")
    pipeline, source = to_pipeline(load(model), scheduler), locate(model)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        pipeline.save_pretrained(temporary)
        (temporary / "README.md").write_text(_readme(pipeline.denoiser.card))
        for path in source.iterdir():
            if path.stem in ("ATTRIBUTION", "LICENSE", "NOTICE"):  # whoever gets the weights gets these too
                shutil.copyfile(path, temporary / path.name)
        for path in temporary.rglob("*"):  # safetensors writes files that only their owner can read
            path.chmod(0o755 if path.is_dir() else 0o644)
        temporary.chmod(0o755)
        temporary.replace(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder} ({error.strerror}): choose another place") from None
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary)
    return folder


def _readme(card: dict[str, Any]) -> str:
    """A page for people; everything else is in ``denoiser/config.json``."""
    levels, data, base = card.get("sigma_y_range"), card.get("training_data"), card.get("base")
    facts = {
        "Noise it was trained for": f"sigma_y from {levels[0]:g} to {levels[1]:g}, images in [-1, 1]"
        if levels
        else None,
        "Tasks": ", ".join(card.get("tasks") or ()),
        "Training data": "; ".join(str(v) for v in data.values()) if isinstance(data, dict) else data,
        "Fine-tuned from": "; ".join(str(v) for v in base.values()) if isinstance(base, dict) else base,
    }
    lines = [f"- {what}: {value}" for what, value in facts.items() if value]
    return README.format(name=card.get("name", "posterior sampler"), facts="\n".join(lines))
