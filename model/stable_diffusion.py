"""One Stable Diffusion in memory: load it, read prompts, draw pictures, turn pictures into latents.

What it is:  the four parts (UNet, VAE, text encoders, noise schedule) and the two directions between a
             prompt and a picture.
Needs:       torch, a checkpoint: a diffusers folder or a single .safetensors file.
Gives:       load(), StableDiffusion, skeleton(), pick_device(), precision(), usual(), at_once(), latent_side().

Where the families differ, besides their UNet's config and their text encoders (unet.py, text.py):
    SD 1.x, base 2.x   predict noise             SD 2.x at 768 px   predicts v (schedule.py)
    SDXL               the UNet also reads the pooled prompt and the picture's size; an empty negative prompt is zeros

Letters: B batch, H W picture height and width in pixels, f the VAE's reduction (8, toy 4), h w = H/f, W/f, C latent
channels (4), L tokens, D context width, P pooled width.
"""
from pathlib import Path

import numpy as np
import torch

from .checkpoint import Checkpoint, unet_files  # noqa: F401 (the scripts import it from here)
from .files import TOY, BadInput
from .schedule import SAMPLERS, NoiseSchedule, sample
from .text import TextEncoders
from .unet import UNet
from .vae import VAE


def pick_device(name: str) -> torch.device:
    """ "auto" is cuda, then mps, then cpu. Raises BadInput for a device that torch does not know or have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        (number := torch.zeros(1, device=name)).item()     # not on "meta", where there are shapes and no numbers
        return number.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise BadInput(f"--device {name}: {str(error).splitlines()[0]}; use cpu, cuda or auto") from None


def precision(device: torch.device) -> torch.dtype:
    """Of frozen weights, and of autocast: bf16 on a GPU (fp16 where it would only emulate bf16), at half the memory; else fp32."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def usual(model: Path) -> tuple[int, float]:
    """(sampling steps, guidance) where the user names none: what the toy is drawn with, or a real model."""
    return (10, 3.0) if model.resolve() == TOY.resolve() else (25, 7.5)


def latent_side(config: dict) -> int:
    """The side of the latents that a UNet of this config was trained on."""
    return config.get("sample_size") or (128 if config.get("addition_embed_type") == "text_time" else 64)


def at_once(side: int) -> int:
    """How many pictures of this side, in pixels, are drawn together where the user does not say: a megapixel of them, at most 16."""
    return max(1, min(16, 1024 ** 2 // side ** 2))


class StableDiffusion:
    """unet, vae, text, schedule: frozen, in eval mode, on one device. zero_negative: the empty negative prompt is zeros."""

    def __init__(self, unet: UNet, vae: VAE, text: TextEncoders, schedule: NoiseSchedule, device: torch.device,
                 zero_negative: bool = False):
        self.unet, self.vae, self.text, self.schedule, self.device = unet, vae, text, schedule, device
        self.path = "the model"                                                            # for messages
        self.reduction = 2 ** (len(vae.config["block_out_channels"]) - 1)                  # f
        self.scale = vae.config.get("scaling_factor", 0.18215)        # of latents; early SD 1 configs do not say it
        self.zero_negative, self.pooled = zero_negative, 0                                 # P, 0 for none
        if unet.add_embedding is not None:
            self.pooled = unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
        self.size = latent_side(unet.config) * self.reduction                              # the side of a picture
        for part in (unet, vae, text):
            part.requires_grad_(False).eval().to(device)

    def noise(self, seeds: list[int], size: int) -> torch.Tensor:
        """Start noise [B, C, size/f, size/f]. One CPU generator a picture: the same seed gives the same
        picture on any device and in any batch, and the picture that diffusers gives. Raises BadInput for a size
        that the VAE cannot make."""
        if size < self.reduction or size % self.reduction:
            raise BadInput(f"--size {size} is not a positive multiple of {self.reduction}, this model's reduction; use one that is")
        side = size // self.reduction
        shape = (self.vae.config.get("latent_channels", 4), side, side)
        return torch.stack([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(s)) for s in seeds])

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """All that the UNet reads of prompts, as ONE tensor [B, L, D], so that whoever caches, picks or batches prompts
        handles one thing. SDXL: [B, L+1, D], the pooled [P] riding in one more row, filled up with zeros (P <= D)."""
        context, pooled = self.text.encode(prompts)
        if not self.pooled:
            return context
        row = torch.nn.functional.pad(pooled, (0, context.shape[-1] - self.pooled))
        return torch.cat([context, row[:, None]], dim=1)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """The UNet's output [B, C, h, w] at x_t (any float dtype), t [B], for prompts as embed() gives them."""
        dtype = self.unet.conv_in.weight.dtype
        x_t, prompt = x_t.to(dtype), prompt.to(dtype)
        if not self.pooled:
            return self.unet(x_t, t, prompt)
        # The picture is its own original: nothing scaled, nothing cropped. [original h, w, top, left, target h, w]
        h, w = (side * self.reduction for side in x_t.shape[-2:])
        sizes = torch.tensor([[h, w, 0, 0, h, w]], device=x_t.device).expand(len(x_t), -1)
        return self.unet(x_t, t, prompt[:, :-1], prompt[:, -1, :self.pooled], sizes)

    def unconditional(self) -> torch.Tensor:
        """No prompt at all, [1, L, D] as embed() gives it: the empty prompt, and for SDXL zeros, from which it draws without one."""
        prompt = self.embed([""])
        return torch.zeros_like(prompt) if self.zero_negative else prompt

    @torch.no_grad()
    def draw(self, prompts: list[str], seeds: list[int], steps: int, guidance: float, sampler: str = "dpm++",
             negative: str = "", size: int | None = None) -> np.ndarray:
        """Draws prompt i from seed i. Returns uint8 [B, size, size, 3].

        Classifier-free guidance (Ho & Salimans 2022; README, eq. 10): eps = eps(negative) + guidance * (eps(prompt) - eps(negative)).
        Both halves are one batch; guidance 1 is eps(prompt) alone, at half the cost.
        """
        x, guided = self.noise(seeds, size or self.size).to(self.device), guidance != 1
        prompt = self.embed([negative] * len(prompts) * guided + list(prompts))            # [2B, L, D]
        if guided and self.zero_negative and not negative:
            prompt[:len(prompts)] = self.unconditional()

        def predict(x_t, t):
            output = self.predict(x_t.repeat(1 + guided, 1, 1, 1), torch.full((len(prompt),), t, device=self.device), prompt)
            if not guided:
                return output
            without, with_prompt = output.float().chunk(2)
            return without + guidance * (with_prompt - without)

        try:
            SAMPLERS[sampler][0](self.schedule, steps)
        except ValueError as error:
            raise BadInput(f"--steps {steps}: {error}") from None
        return self.decode(self.finite(sample(predict, x, self.schedule, steps, sampler), "the picture"))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents as the UNet sees them [B, C, h, w] -> uint8 pictures [B, H, W, 3].

        In slices of at most 512 x 512 pixels in all (or one picture), so that memory does not grow with B: the VAE's
        widest layers are many times the size of anything in the UNet.
        """
        z = (latents / self.scale).to(self.vae.decoder.conv_in.weight.dtype)
        several = max(1, 512 ** 2 // (z[0, 0].numel() * self.reduction ** 2))
        images = self.finite(torch.cat([self.vae.decode(part).float().cpu() for part in z.split(several)]), "the decoded picture")
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()

    @torch.no_grad()
    def moments(self, pictures: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 pictures [B, H, W, 3] -> mean and standard deviation [B, C, h, w], fp32, of the VAE's posterior, times
        scaling_factor: mean + deviation * noise is a latent as the UNet sees it. In slices, as decode()."""
        images = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts = images.to(self.vae.decoder.conv_in.weight.dtype).split(max(1, 512 ** 2 // images[0, 0].numel()))
        mean, logvar = (torch.cat(part) for part in zip(*map(self.vae.encode, parts)))
        return self.finite(mean.float() * self.scale, "the encoded picture"), (logvar.float() / 2).exp() * self.scale

    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        """uint8 pictures [B, H, W, 3] -> latents as the UNet sees them [B, C, h, w], fp32: the posterior's mean."""
        return self.moments(pictures)[0]

    def finite(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """The tensor, if it holds no NaN and no infinity. Else raises BadInput with the reason: a damaged weight, by name.
        Looked for only now, since reading all weights of a mapped file to look earlier would cost more than loading it."""
        if tensor.isfinite().all():
            return tensor
        for part, module in (("unet", self.unet), ("vae", self.vae), ("text encoder", self.text)):
            for name, weight in module.named_parameters():
                if not weight.isfinite().all():
                    raise BadInput(f"{self.path}: {part} {name} holds NaN or infinity; get an undamaged copy of the checkpoint")
        raise BadInput(f"{what} holds NaN or infinity, and the weights do not: numbers grew too large; lower what scales them (guidance, a LoRA's strength)")


def predicts_noise(sd: StableDiffusion) -> bool:
    """Whether the UNet predicts noise, or else v: asked with almost pure noise, x_t = 0.07 x_0 + 0.998 eps, the first
    answers with that noise, and the second with about -x_0, which has nothing to do with it."""
    x = sd.noise([0], 16 * sd.reduction).to(sd.device)
    answer = sd.predict(x, torch.tensor([sd.schedule.T - 1], device=sd.device), sd.embed([""]))
    return torch.nn.functional.cosine_similarity(answer.flatten().float(), x.flatten(), dim=0).item() > 0.5


@torch.no_grad()
def load(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> StableDiffusion:
    """Loads a diffusers folder or a single file, in precision(device) unless a dtype is given. Raises BadInput, naming
    file and key, for anything missing, extra, of another shape or unreadable, and for other models; NaN is found in use, see finite()."""
    checkpoint, dtype = Checkpoint(path), dtype or precision(device)
    try:
        config = checkpoint.config("scheduler")
        schedule = NoiseSchedule(config)         # first: it takes no time, and may refuse
        text = TextEncoders.of(checkpoint, dtype, device)
        # SDXL's VAE overflows in fp16, and the picture is black: there it runs in fp32. bf16 reaches as far as fp32.
        vae = checkpoint.build("vae", VAE, device, torch.float32 if dtype == torch.float16 else dtype)
        unet = checkpoint.build("unet", UNet, device, dtype)
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: {error}") from None
    sd = StableDiffusion(unet, vae, text, schedule, device, checkpoint.zero_negative)
    sd.path = path
    if checkpoint.family == "SD 2" and not checkpoint.has_config("scheduler") and predicts_noise(sd):
        sd.schedule = NoiseSchedule({**config, "prediction_type": "epsilon"})
        sd.size = sd.size if checkpoint.has_config("unet") else 512
    return sd


def skeleton(path: Path) -> UNet:
    """The checkpoint's UNet without its weights: names and shapes, to see in a moment whether a LoRA fits."""
    try:
        return Checkpoint(path).skeleton("unet", UNet)
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
