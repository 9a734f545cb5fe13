"""One Stable Diffusion in memory: load it, read prompts, generate images, encode images as latents.

Needs:  torch, and a checkpoint: a diffusers folder or a single .safetensors file.
Gives:  load_denoiser() for what training reads, load() for all; side_of() and skeleton(),
        which read no weights; at_once().

Where the families differ, besides their UNet's config and their text encoders (unet.py, text.py):
    SD 1.x, base 2.x   predict noise             SD 2.x at 768 px   predicts v (schedule.py)
    SDXL               the UNet also reads the pooled prompt and the image's size; without a
                       negative prompt, guidance subtracts what it predicts for zeros

Letters: B batch, H W image height and width in pixels, f the VAE's reduction (8, toy 4),
h w = H/f, W/f, C latent channels (4), L tokens, D context width, P pooled width.
"""
from functools import partial
from pathlib import Path

import torch
from torch import nn

from model.formats.checkpoint import Checkpoint
from model.schedule import SAMPLERS, NoiseSchedule, sample
from model.text import Prompt, TextEncoders
from model.tools.command import BadInput
from model.tools.device import PRECISIONS, layout, precision
from model.tools.images import as_tensor
from model.unet import UNet
from model.vae import VAE


def at_once(side: int) -> int:
    """How many images of this side, in pixels, are generated together where the user does not say:
    a megapixel of them, at most 16 [ours]."""
    return max(1, min(16, 1024 ** 2 // side ** 2))


def latent_side(config: dict) -> int:
    """Of the images that a UNet of this config was trained on."""
    return int(config.get("sample_size") or (128 if config.get("addition_embed_type") else 64))


class Denoiser:
    """A UNet and its noise schedule: all that training and merging need. Frozen, in eval mode.

    path: for messages. reduction: f. channels: C. size: an image's side in pixels.
    """
    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        self.path, self.device = checkpoint.path, device
        self.reduction = checkpoint.on_meta("vae", VAE).reduction
        self.size = checkpoint.from_config("unet", latent_side) * self.reduction
        self.schedule = checkpoint.from_config("scheduler", NoiseSchedule)    # before the weights
        self.unet = checkpoint.load("unet", UNet, device, dtype).requires_grad_(False).eval()
        self.unet.to(memory_format=layout(dtype))
        self.channels = self.unet.conv_in.in_channels
        # A single file of SD 2 does not say whether it predicts v, as its configs here assume.
        silent = checkpoint.family == "SD 2" and not checkpoint.has_config("scheduler")
        if silent and self.predicts_noise():
            self.schedule.prediction_type = "epsilon"
            self.size = self.size if checkpoint.has_config("unet") else 512

    def predicts_noise(self) -> bool:
        """Whether the UNet predicts noise, or else v. From almost pure noise, x_t = 0.07 x_0 +
        0.998 eps, and no prompt, the first predicts that noise; the second predicts about -x_0,
        which has nothing to do with it."""
        x = self.start_noise([0], 16 * self.reduction)
        t = torch.tensor([self.schedule.T - 1], device=self.device)
        nothing = Prompt(torch.zeros(1, 1, self.unet.context_width, device=self.device))
        output = self.predict(x, t, nothing).flatten().float()
        return torch.cosine_similarity(output, x.flatten(), dim=0).item() > 0.5

    def start_noise(self, seeds: list[int], size: int):
        """x_T [B, C, size/f, size/f], drawn on the CPU. One generator an image: the same seed gives
        the same image on any device and in any batch, and the one that diffusers gives."""
        side = size // self.reduction
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        noise = [torch.randn(self.channels, side, side, generator=rng) for rng in generators]
        return torch.stack(noise).to(self.device)

    def predict(self, x_t, t, prompt: Prompt):
        """The UNet's output [B, C, h, w] at x_t (any float dtype), t [B]."""
        dtype = self.unet.conv_norm_out.weight.dtype    # of a layer that no LoRA adapts
        x_t, prompt = x_t.to(dtype), prompt.to(dtype)
        # SDXL also reads sizes. The image is its own original: nothing scaled, nothing cropped.
        h, w = (side * self.reduction for side in x_t.shape[-2:])
        sizes = torch.tensor([[h, w, 0, 0, h, w]], device=x_t.device).expand(len(x_t), -1)
        return self.unet(x_t, t, prompt.context, prompt.pooled, sizes)

    def finite(self, tensor, what: str,
               cure="lower what scales them (guidance, a LoRA's strength)"):
        """The tensor, if it holds no NaN and no infinity; else raises BadInput with the reason.
        Weights are looked at only now: to read them all earlier would cost more than to load. A
        LoRA in training is not: it may be what grew."""
        if tensor.isfinite().all():
            return tensor
        for part in ("unet", "vae", "text"):
            for name, weight in getattr(self, part, nn.Module()).named_parameters():
                if not (weight.requires_grad or weight.isfinite().all()):
                    raise BadInput(f"{self.path}: {part} {name} holds NaN or infinity; get an "
                                   "undamaged copy of the checkpoint")
        raise BadInput(f"{what} holds NaN or infinity, and the weights do not: numbers grew too "
                       f"large; {cure}")


class StableDiffusion(Denoiser):
    """With VAE and text encoders. scale: of latents. zero_negative: no negative prompt is zeros."""
    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        super().__init__(checkpoint, device, dtype)
        self.text = TextEncoders.of(checkpoint, dtype, device)
        # SDXL's VAE overflows in fp16, and the picture is black. bf16 reaches as far as fp32.
        self.vae_dtype = torch.float32 if dtype == torch.float16 else dtype
        self.vae = checkpoint.load("vae", VAE, device, torch.float32).requires_grad_(False).eval()
        # The encoder stays fp32: the latents it writes once are what all training is measured by.
        for decoding in (self.vae.post_quant_conv, self.vae.decoder):
            decoding.to(self.vae_dtype, memory_format=layout(self.vae_dtype))
        self.scale = self.vae.config.get("scaling_factor", 0.18215)    # early SD 1 do not say it
        self.zero_negative = checkpoint.zero_negative

    def embed(self, prompts: list[str]) -> Prompt:
        """What the UNet reads of these prompts."""
        return self.text.encode(prompts)

    def unconditional(self) -> Prompt:
        """What guidance subtracts, a batch of one: the empty prompt; for SDXL zeros."""
        prompt = self.embed([""])
        return prompt.map(torch.zeros_like) if self.zero_negative else prompt

    def embed_guided(self, prompts: list[str], negative="") -> Prompt:
        """What guide() needs: the negative prompt for each of B prompts, and then the prompts."""
        both, B = self.embed([negative] * len(prompts) + list(prompts)), len(prompts)
        if negative or not self.zero_negative:
            return both
        return both[:B].map(torch.zeros_like).followed_by(both[B:])

    def guide(self, prompt: Prompt, guidance: float, x_t, t: int):
        """Classifier-free guidance (Ho & Salimans 2022): the output [B, C, h, w]
            eps = eps(negative) + guidance * (eps(prompt) - eps(negative))
        at x_t. prompt: of embed_guided(), 2B of them; for guidance 1 the B prompts alone."""
        times = torch.full((len(prompt.context),), t, device=self.device)
        if guidance == 1:
            return self.predict(x_t, times, prompt)
        output = self.predict(x_t.repeat(2, 1, 1, 1), times, prompt).float()
        without, with_prompt = output.chunk(2)
        return without + guidance * (with_prompt - without)

    @torch.no_grad()
    def generate(self, prompts: list[str], seeds: list[int], steps: int, guidance: float,
                 sampler="dpm++", negative="", size: int | None = None):
        """Image i is of prompt i, from seed i. Returns uint8 [B, size, size, 3]; size: a multiple
        of f. Raises BadInput for too many steps, and for numbers that are not finite."""
        prompt = self.embed(prompts) if guidance == 1 else self.embed_guided(prompts, negative)
        x_T = self.start_noise(seeds, size or self.size)
        predict = partial(self.guide, prompt, guidance)
        latents = sample(predict, x_T, self.schedule, steps, sampler)
        return self.decode(self.finite(latents, "the generated image"))

    @torch.no_grad()
    def decode(self, latents):
        """Latents as the UNet sees them [B, C, h, w] -> uint8 images [B, H, W, 3]. In slices of
        512 x 512 pixels in all, or one image: the VAE's widest layers would fill the memory."""
        z = (latents / self.scale).to(self.vae_dtype)
        slices = z.split(max(1, 512 ** 2 // (z[0, 0].numel() * self.reduction ** 2)))
        images = torch.cat([self.vae.decode(part).float().cpu() for part in slices])
        images = (self.finite(images, "the decoded image") / 2 + 0.5).clamp(0, 1) * 255
        return images.round().byte().permute(0, 2, 3, 1).numpy()

    @torch.no_grad()
    def encode(self, images):
        """uint8 images [B, H, W, 3] -> latents as the UNet sees them [B, C, h, w], fp32: the mean
        of the VAE's posterior, times scale. In fp32 always; in slices, as decode()."""
        pixels = as_tensor(images, self.device)
        slices = pixels.split(max(1, 512 ** 2 // pixels[0, 0].numel()))
        mean = torch.cat([self.vae.encode(part)[0] for part in slices])
        return self.finite(mean * self.scale, "the encoded image")


def load_denoiser(path: Path, device: torch.device, wanted="auto") -> Denoiser:
    """Loads the UNet and the schedule alone, as load() does."""
    return Denoiser(Checkpoint(path), device, PRECISIONS[precision(device, wanted)])


def load(path: Path, device: torch.device, wanted="auto") -> StableDiffusion:
    """Loads a diffusers folder or a single file. wanted: of --precision. Raises BadInput,
    naming file and key, for anything missing, extra, of another shape or unreadable, and for other
    models. NaN is found in use, by finite()."""
    return StableDiffusion(Checkpoint(path), device, PRECISIONS[precision(device, wanted)])


def skeleton(path: Path) -> UNet:
    """The UNet without its weights: names and shapes, to see in a moment whether a LoRA fits."""
    return Checkpoint(path).on_meta("unet", UNet)


def side_of(path: Path, size: int | None, steps: int, sampler="dpm++") -> int:
    """The side of images to draw, in pixels: `size`, or else that of the images that the model was
    trained on. (A single file of SD 2 says 768 here, and may be a 512 by its weights: load() finds
    out.) Raises BadInput for a side that the model's VAE cannot make, and for more steps than its
    schedule has: now, and not when the images of other settings are gone."""
    checkpoint = Checkpoint(path)
    SAMPLERS[sampler][0](checkpoint.from_config("scheduler", NoiseSchedule), steps)
    reduction = checkpoint.on_meta("vae", VAE).reduction
    if size and size % reduction:
        raise BadInput(f"--size {size} is not a positive multiple of {reduction}, this model's "
                       "reduction; use one that is")
    return size or checkpoint.from_config("unet", latent_side) * reduction
