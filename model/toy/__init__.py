"""The embedded world, and the Stable Diffusion that was trained on it: this folder is a diffusers
checkpoint."""
from pathlib import Path

from model.tools.command import TOY


def is_toy(model: Path) -> bool:
    return model.resolve() == TOY.resolve()


def usual_settings(model: Path):
    """(sampling steps, guidance) where the user does not say. The toy's were chosen on its
    images; the others are what Stable Diffusion is commonly used with."""
    return (10, 3.0) if is_toy(model) else (25, 7.5)
