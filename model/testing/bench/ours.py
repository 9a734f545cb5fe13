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


def picture(folder: str, device: str, dtype: str, side: str, steps: str):
    sd = load(Path(folder), torch.device(device), getattr(torch, dtype))
    yield
    for _ in range(2):
        sd.generate(["a red ball"], [0], int(steps), 4.0, sampler="ddim", size=int(side))
        yield


def random_prompt(unet, pairs: int) -> Prompt:
    return Prompt(torch.randn(pairs, 77, unet.context_width), torch.randn(pairs, unet.pooled_width))


def random_pair(denoiser) -> tuple:
    """(x_t, t, prompt) of two images of 256 px."""
    prompt = random_prompt(denoiser.unet, 2)
    return torch.randn(2, 4, 32, 32), torch.tensor([100, 700]), prompt


def forward(folder: str):
    """The floor of a training step: a pair through the UNet, once."""
    denoiser = load_denoiser(Path(folder), CPU)
    batch = random_pair(denoiser)
    yield
    with torch.no_grad():
        for _ in range(2):
            denoiser.predict(*batch)
            yield


def random_pairs(folder: str, side: str, pairs: int) -> Pairs:
    """What make_data.py would write of images of this side, in pixels."""
    unet, side = skeleton(Path(folder)), int(side) // 8
    winner, loser = torch.randn(2, pairs, 4, side, side)
    prompts = [random_prompt(unet, n) for n in (pairs, pairs, 1)]
    return Pairs(winner, loser, *prompts)


def step(folder: str, side: str, *flags: str):
    """A step of the published loss, on random latents: train.train(), which the loss tells when a
    step begins."""
    args = train.parse_arguments(["--model", folder, *flags])
    device, precision = device_and_precision(args.device, args.precision)
    denoiser = load_denoiser(Path(folder), device, precision)
    denoiser.unet.checkpointing = args.checkpointing
    fresh = lora.init(denoiser.unet, 4, 4, torch.Generator())
    parameters, pairs = lora.inject(denoiser.unet, fresh), random_pairs(folder, side, args.batch)
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
    pairs = random_pairs(folder, side, merge.CALIBRATION_PAIRS)
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
