"""One Stable Diffusion in memory: load it, read prompts, draw pictures, turn pictures into latents.

Needs:  torch, and a checkpoint: a diffusers folder or a single .safetensors file.
Gives:  load_denoiser() for what training reads, load() for all; picture_size(), check_drawing()
        and skeleton(), which read no weights; at_once().

Where the families differ, besides their UNet's config and their text encoders (unet.py, text.py):
    SD 1.x, base 2.x   predict noise             SD 2.x at 768 px   predicts v (schedule.py)
    SDXL               the UNet also reads the pooled prompt and the picture's size; without a
                       negative prompt, guidance subtracts the answer to zeros

Letters: B batch, H W picture height and width in pixels, f the VAE's reduction (8, toy 4),
h w = H/f, W/f, C latent channels (4), L tokens, D context width, P pooled width.
"""
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model.formats.checkpoint import Checkpoint
from model.schedule import SAMPLERS, NoiseSchedule, sample
from model.text import TextEncoders
from model.tools.command import BadInput
from model.tools.device import layout, precision
from model.unet import UNet
from model.vae import VAE

def at_once(side: int) -> int:
    """How many pictures of this side, in pixels, are drawn together where the user does not say: a
    megapixel of them, at most 16."""
    return max(1, min(16, 1024 ** 2 // side ** 2))


def latent_side(config: dict) -> int:
    """Of the pictures that a UNet of this config was trained on."""
    return int(config.get("sample_size") or (128 if config.get("addition_embed_type") else 64))


class Denoiser:
    """A UNet and its noise schedule: all that training and merging need. Frozen, in eval mode.

    path: for messages. reduction: f. channels: C. pooled: P or 0. size: a picture's side in pixels.
    """
    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        self.path, self.device = checkpoint.path, device
        self.reduction = checkpoint.skeleton("vae", VAE).reduction
        self.size = checkpoint.make("unet", latent_side) * self.reduction
        self.schedule = checkpoint.make("scheduler", NoiseSchedule)    # before the weights
        self.unet = checkpoint.build("unet", UNet, device, dtype).requires_grad_(False).eval()
        self.unet.to(memory_format=layout(dtype))
        self.pooled, self.channels = self.unet.pooled_width, self.unet.conv_in.in_channels
        # A single file of SD 2 does not say whether it predicts v, as its configs here assume.
        silent = checkpoint.family == "SD 2" and not checkpoint.has_config("scheduler")
        if silent and self.predicts_noise():
            self.schedule.prediction_type = "epsilon"
            self.size = self.size if checkpoint.has_config("unet") else 512

    def predicts_noise(self) -> bool:
        """Whether the UNet predicts noise, or else v: asked with almost pure noise, x_t = 0.07 x_0
        + 0.998 eps, and no prompt, the first answers with that noise; the second with about -x_0,
        which has nothing to do with it."""
        x = self.noise([0], 16 * self.reduction).to(self.device)
        t = torch.tensor([self.schedule.T - 1], device=self.device)
        answer = self.predict(x, t, torch.zeros(1, 1, self.unet.context_width, device=self.device))
        return F.cosine_similarity(answer.flatten().float(), x.flatten(), dim=0).item() > 0.5

    def noise(self, seeds: list[int], size: int) -> torch.Tensor:
        """Start noise [B, C, size/f, size/f] on the CPU. One generator a picture: the same seed
        gives the same picture on any device and in any batch, and the one that diffusers gives."""
        shape = (self.channels, size // self.reduction, size // self.reduction)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """The UNet's output [B, C, h, w] at x_t (any float dtype), t [B]; prompt: of embed()."""
        dtype = self.unet.conv_norm_out.weight.dtype    # of a layer that no LoRA adapts
        x_t, prompt = x_t.to(dtype), prompt.to(dtype)
        if not self.pooled:
            return self.unet(x_t, t, prompt)
        # The picture is its own original: nothing scaled, nothing cropped.
        h, w = (side * self.reduction for side in x_t.shape[-2:])
        sizes = torch.tensor([[h, w, 0, 0, h, w]], device=x_t.device).expand(len(x_t), -1)
        return self.unet(x_t, t, prompt[:, :-1], prompt[:, -1, :self.pooled], sizes)

    def finite(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """The tensor, if it holds no NaN and no infinity; else raises BadInput with the reason.
        Weights are looked at only now: to read them all earlier would cost more than to load."""
        if tensor.isfinite().all():
            return tensor
        for part in ("unet", "vae", "text"):
            for name, weight in getattr(self, part, nn.Module()).named_parameters():
                if not weight.isfinite().all():
                    raise BadInput(f"{self.path}: {part} {name} holds NaN or infinity; get an "
                                   "undamaged copy of the checkpoint")
        raise BadInput(f"{what} holds NaN or infinity, and the weights do not: numbers grew too "
                       "large; lower what scales them (guidance, a LoRA's strength)")


class StableDiffusion(Denoiser):
    """With VAE and text encoders. scale: of latents. zero_negative: no negative prompt is zeros."""
    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        super().__init__(checkpoint, device, dtype)
        self.text = TextEncoders.of(checkpoint, dtype, device)
        # SDXL's VAE overflows in fp16, and the picture is black. bf16 reaches as far as fp32.
        self.vae_dtype = torch.float32 if dtype == torch.float16 else dtype
        self.vae = checkpoint.build("vae", VAE, device, torch.float32).requires_grad_(False).eval()
        # The encoder stays fp32: the latents it writes once are what all training is measured by.
        for decoding in (self.vae.post_quant_conv, self.vae.decoder):
            decoding.to(self.vae_dtype, memory_format=layout(self.vae_dtype))
        self.scale = self.vae.config.get("scaling_factor", 0.18215)    # early SD 1 do not say it
        self.zero_negative = checkpoint.zero_negative

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """All that the UNet reads of prompts, as ONE tensor [B, L, D]: one thing to keep, pick and
        batch. SDXL: [B, L+1, D], with the pooled [P] in one more row, filled up with zeros."""
        context, pooled = self.text.encode(prompts)
        if not self.pooled:
            return context
        row = F.pad(pooled, (0, context.shape[-1] - self.pooled))
        return torch.cat([context, row[:, None]], dim=1)

    def unconditional(self) -> torch.Tensor:
        """What guidance subtracts, [1, L, D] as embed() gives it: the empty prompt; SDXL: zeros."""
        prompt = self.embed([""])
        return torch.zeros_like(prompt) if self.zero_negative else prompt

    def guide(self, context: torch.Tensor, guidance: float, x_t: torch.Tensor, t: int):
        """Classifier-free guidance (Ho & Salimans 2022; README, eq. 10): the output [B, C, h, w]
            eps = eps(negative) + guidance * (eps(prompt) - eps(negative))
        at x_t. context: [2B, L, D], both halves one batch; for guidance 1 the prompts' alone."""
        times = torch.full((len(context),), t, device=self.device)
        if guidance == 1:
            return self.predict(x_t, times, context)
        output = self.predict(x_t.repeat(2, 1, 1, 1), times, context).float()
        without, with_prompt = output.chunk(2)
        return without + guidance * (with_prompt - without)

    @torch.no_grad()
    def draw(self, prompts: list[str], seeds: list[int], steps: int, guidance: float,
             sampler: str = "dpm++", negative: str = "", size: int | None = None) -> np.ndarray:
        """Draws prompt i from seed i. Returns uint8 [B, size, size, 3]; size is a multiple of f.
        Raises BadInput for too many steps, and for numbers that are not finite."""
        negatives = [negative] * len(prompts) if guidance != 1 else []
        context = self.embed(negatives + list(prompts))
        if self.zero_negative and not negative:
            context[:len(negatives)] = 0
        noise = self.noise(seeds, size or self.size).to(self.device)
        predict = partial(self.guide, context, guidance)
        latents = sample(predict, noise, self.schedule, steps, sampler)
        return self.decode(self.finite(latents, "the picture"))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents as the UNet sees them [B, C, h, w] -> uint8 pictures [B, H, W, 3]. In slices of
        512 x 512 pixels in all, or one picture: the VAE's widest layers would fill the memory."""
        z = (latents / self.scale).to(self.vae_dtype)
        slices = z.split(max(1, 512 ** 2 // (z[0, 0].numel() * self.reduction ** 2)))
        images = torch.cat([self.vae.decode(part).float().cpu() for part in slices])
        images = (self.finite(images, "the decoded picture") / 2 + 0.5).clamp(0, 1) * 255
        return images.round().byte().permute(0, 2, 3, 1).numpy()

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        """uint8 pictures [B, H, W, 3] -> latents as the UNet sees them [B, C, h, w], fp32: the mean
        of the VAE's posterior, times scale. In fp32 always; in slices, as decode()."""
        images = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        slices = images.split(max(1, 512 ** 2 // images[0, 0].numel()))
        mean = torch.cat([self.vae.encode(part)[0] for part in slices])
        return self.finite(mean * self.scale, "the encoded picture")


def load_denoiser(path: Path, device: torch.device, dtype: str | torch.dtype = "auto") -> Denoiser:
    """Loads the UNet and the schedule alone, as load() does."""
    return Denoiser(Checkpoint(path), device, precision(device, dtype))


def load(path: Path, device: torch.device, dtype: str | torch.dtype = "auto") -> StableDiffusion:
    """Loads a diffusers folder or a single file. dtype: as precision() wants it. Raises BadInput,
    naming file and key, for anything missing, extra, of another shape or unreadable, and for other
    models. NaN is found in use, by finite()."""
    return StableDiffusion(Checkpoint(path), device, precision(device, dtype))


def skeleton(path: Path) -> UNet:
    """The UNet without its weights: names and shapes, to see in a moment whether a LoRA fits."""
    return Checkpoint(path).skeleton("unet", UNet)


def picture_size(path: Path) -> int:
    """The side in pixels of the pictures that the model was trained on. (A single file of SD 2 says
    768 here, and may be a 512 by its weights: load() finds out.)"""
    checkpoint = Checkpoint(path)
    return checkpoint.make("unet", latent_side) * checkpoint.skeleton("vae", VAE).reduction


def check_drawing(path: Path, size: int, steps: int, sampler: str = "dpm++"):
    """Raises BadInput for a side, in pixels, that the model's VAE cannot make, and for more steps
    than its schedule has: now, and not when the pictures of other settings are gone."""
    checkpoint = Checkpoint(path)
    SAMPLERS[sampler][0](checkpoint.make("scheduler", NoiseSchedule), steps)
    reduction = checkpoint.skeleton("vae", VAE).reduction
    if size < 1 or size % reduction:
        raise BadInput(f"--size {size} is not a positive multiple of {reduction}, this model's "
                       "reduction; use one that is")
