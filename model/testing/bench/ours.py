"""This project's jobs, each a generator (clock.py)."""
from pathlib import Path

import torch

import lora
import merge
import train
from dpo import diffusion_dpo
from model.data.pairs import Pairs
from model.formats.experts import Experts
from model.stable_diffusion import load, load_denoiser, skeleton
from model.text import Prompt
from model.tools.device import device_and_precision

CPU = torch.device("cpu")


def picture(folder: str, dtype: str, side: str, steps: str, device: str):
    sd = load(Path(folder), torch.device(device), getattr(torch, dtype))
    yield
    for _ in range(2):
        sd.generate(["a red ball"], [0], int(steps), 4.0, sampler="ddim", size=int(side))
        yield


def random_prompt(unet, pairs: int) -> Prompt:
    return Prompt(torch.randn(pairs, 77, unet.context_width), torch.randn(pairs, unet.pooled_width))


def random_pair(denoiser) -> tuple:
    """(x_t, t, prompt) of two images of 256 px."""
    return (torch.randn(2, 4, 32, 32), torch.tensor([100, 700]), random_prompt(denoiser.unet, 2))


@torch.no_grad()
def forward(folder: str):
    """The floor of a training step: a pair through the UNet, once."""
    denoiser = load_denoiser(Path(folder), CPU)
    batch = random_pair(denoiser)
    yield
    for _ in range(2):
        denoiser.predict(*batch)
        yield


def random_pairs(unet, side: int, pairs: int) -> Pairs:
    """What make_data.py would write of images of this side, in pixels."""
    winner, loser = torch.randn(2, pairs, 4, side // 8, side // 8)
    return Pairs(winner, loser, *(random_prompt(unet, n) for n in (pairs, pairs, 1)))


def step(folder: str, side: str, *flags: str):
    """A step of the published loss, on random latents: train.train()."""
    args = train.parse_arguments(["--model", folder, *flags])
    device, precision = device_and_precision(args.device, args.precision)
    denoiser = load_denoiser(Path(folder), device, precision)
    denoiser.unet.checkpointing = args.checkpointing
    pairs = random_pairs(denoiser.unet, int(side), args.batch)
    parameters = lora.inject(denoiser.unet, lora.init(denoiser.unet, 4, 4, torch.Generator()))
    yield
    for number in range(3):
        train.train(denoiser, parameters, pairs, diffusion_dpo, Path("no state"),
                    {"concept": "bench"}, number, precision=precision, beta=5000, lr=1e-5, steps=1,
                    batch_size=args.batch, accumulate=1, caption_dropout=0)
        yield


def combine(experts: str, *flags: str):
    args = merge.parse_arguments([experts, *flags, "--out", f"{experts}/merged/out.safetensors"])
    yield
    merge.main(args)
    yield


def co_merge(folder: str, experts: str, side: str, device: str):
    """The whole of merge.py, calibrated on random pairs."""
    pairs = random_pairs(skeleton(Path(folder)), int(side), merge.CALIBRATION_PAIRS)
    merge.read_latents = lambda *where: pairs
    yield from combine(experts, "--model", folder, "--device", device)


def score(folder: str, experts: str):
    """Co-Merge's pass of what forward() takes."""
    denoiser, paths = load_denoiser(Path(folder), CPU), sorted(Path(experts).glob("*.safetensors"))
    batch = random_pair(denoiser)
    statistics = {name: merge.Statistic(parts, False)
                  for name, parts in Experts(paths, [1.0]).layers()}
    with torch.no_grad():
        denoiser.predict(*batch)
    yield
    merge.measure(denoiser, statistics, [merge.Inputs(0, 1.0, *batch)])
    yield
