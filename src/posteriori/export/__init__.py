"""Trained denoisers as diffusers pipelines.

to_pipeline(denoiser).save_pretrained("folder")
pipe = diffusers.DiffusionPipeline.from_pretrained("folder", trust_remote_code=True)
samples = pipe(y, A, sigma_y=0.05, num_samples=4, output_type="pt").images
"""

from posteriori.export.folder import export_model, to_pipeline
from posteriori.export.pipeline import DenoiserModel, PosteriorOutput, PosteriorPipeline
from posteriori.export.schedulers import SCHEDULERS, make_scheduler

__all__ = [
    "SCHEDULERS",
    "DenoiserModel",
    "PosteriorOutput",
    "PosteriorPipeline",
    "export_model",
    "make_scheduler",
    "to_pipeline",
]
