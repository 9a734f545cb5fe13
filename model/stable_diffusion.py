"""One Stable Diffusion in memory: load it, read prompts, draw pictures, turn pictures into latents.

What it is:  the four parts (UNet, VAE, text encoders, noise schedule) and the two directions between a
             prompt and a picture.
Needs:       torch, safetensors, a checkpoint folder in the diffusers layout.
Gives:       load(), StableDiffusion, pick_device().

Letters: B batch, H W picture height and width in pixels, f the VAE's reduction (8, toy 4), C latent
channels (4), L tokens, D context width, N = B prompts.
"""
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .files import BadInput
from .schedule import SAMPLERS, NoiseSchedule, sample
from .text import TextEncoders
from .unet import UNet
from .vae import VAE


def pick_device(name: str) -> torch.device:
    """ "auto" is cuda, then mps, then cpu. Raises BadInput for a device that torch does not know or have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: {str(error).splitlines()[0]}; use cpu, cuda or auto") from None


class StableDiffusion:
    """unet, vae, text, schedule and the folder they came from. Frozen and in eval mode."""

    def __init__(self, unet: UNet, vae: VAE, text: TextEncoders, schedule: NoiseSchedule, device: torch.device):
        self.unet, self.vae, self.text, self.schedule, self.device = unet, vae, text, schedule, device
        self.reduction = 2 ** (len(vae.config["block_out_channels"]) - 1)                  # f
        self.size = unet.config["sample_size"] * self.reduction                            # the side it was trained at
        for part in (unet, vae, text):
            part.requires_grad_(False).eval().to(device)

    def noise(self, seeds: list[int], size: int) -> torch.Tensor:
        """Start noise [B, C, size/f, size/f]. One CPU generator a picture: the same seed gives the same
        picture on any device and in any batch, and the picture that diffusers gives. Raises BadInput for a size
        that the VAE cannot make."""
        if size < self.reduction or size % self.reduction:
            raise BadInput(f"--size {size} is not a positive multiple of {self.reduction}, this model's reduction; use one that is")
        side = size // self.reduction
        shape = (self.unet.config["in_channels"], side, side)
        return torch.stack([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(s)) for s in seeds])

    @torch.no_grad()
    def draw(self, prompts: list[str], seeds: list[int], steps: int, guidance: float, sampler: str = "dpm++",
             negative: str = "", size: int | None = None) -> np.ndarray:
        """Draws prompt i from seed i. Returns uint8 [B, size, size, 3].

        Classifier-free guidance (Ho & Salimans 2022): eps = eps(negative) + guidance * (eps(prompt) - eps(negative)).
        """
        x = self.noise(seeds, size or self.size).to(self.device)
        context = self.text.encode([negative] * len(prompts) + list(prompts))[0]           # [2B, L, D]

        def predict(x_t, t):
            t = torch.full((2 * len(x_t),), t, device=self.device)
            without, with_prompt = self.unet(torch.cat([x_t, x_t]), t, context).chunk(2)
            return without + guidance * (with_prompt - without)

        try:
            SAMPLERS[sampler][0](self.schedule, steps)
        except ValueError as error:
            raise BadInput(f"--steps {steps}: {error}") from None
        return self.decode(sample(predict, x, self.schedule, steps, sampler))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents as the UNet sees them [B, C, h, w] -> uint8 pictures [B, H, W, 3]."""
        images = self.vae.decode(latents / self.vae.config["scaling_factor"])
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        """uint8 pictures [B, H, W, 3] -> latents as the UNet sees them [B, C, h, w]: the mean of the VAE's
        posterior, times scaling_factor."""
        images = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.vae.encode(images)[0] * self.vae.config["scaling_factor"]


def _config(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise BadInput(f"{path}: cannot be read; --model takes a Stable Diffusion folder in the diffusers layout") from None
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error}); copy the checkpoint again") from None


def weights_file(folder: Path, part: str) -> Path:
    """The safetensors file of unet or vae; raises BadInput if there is none."""
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"):
        if (folder / part / name).is_file():
            return folder / part / name
    raise BadInput(f"{folder / part}: no diffusion_pytorch_model.safetensors; pickled weights (.bin) are never opened, "
                   "so get the checkpoint in safetensors form")


def _part(kind, folder: Path, part: str, dtype: torch.dtype):
    """Builds the module on the meta device and gives it the file's tensors: one strict load, no second copy."""
    with torch.device("meta"):
        module = kind(_config(folder / part / "config.json"))
    path = weights_file(folder, part)
    try:
        module.load_state_dict({k: v.to(dtype) for k, v in load_file(path).items()}, strict=True, assign=True)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({error}); copy the checkpoint again") from None
    except RuntimeError as error:
        raise BadInput(f"{path} does not fit its config.json: {str(error).splitlines()[1].strip()}") from None
    return module


def load(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """Loads a diffusers folder. Raises BadInput, naming the file, for anything missing, extra or unreadable."""
    if not folder.is_dir():
        raise BadInput(f"--model {folder}: no such folder; give a Stable Diffusion folder in the diffusers layout")
    try:
        return StableDiffusion(_part(UNet, folder, "unet", dtype), _part(VAE, folder, "vae", dtype),
                               TextEncoders.load(str(folder), dtype),
                               NoiseSchedule(_config(folder / "scheduler/scheduler_config.json")), device)
    except (ValueError, OSError) as error:
        raise BadInput(f"{folder}: {error}") from None
