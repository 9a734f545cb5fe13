"""The embedded world, and the Stable Diffusion that draws it: this folder is a diffusers
checkpoint."""
from pathlib import Path

TOY = Path(__file__).parent
