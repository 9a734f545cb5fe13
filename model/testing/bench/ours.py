"""This project's jobs, each a generator (clock.py)."""
from pathlib import Path

import torch

import lora
import merge
import train
from dpo import diffusion_dpo
from model.data.pairs import Pairs
from model.formats.experts import Experts
from model.stable_diffusion import load, load_denoiser
from model.text import Prompt
from model.tools.device import device_and_precision
from model.tools.memory import keep_memory

keep_memory()    # as run() does


def image(folder: str, precision: str, side: str, steps: str, device: str):
    sd = load(Path(folder), torch.device(device), precision)
    yield
    for _ in range(2):
        sd.generate(["a red ball"], [0], int(steps), 4.0, sampler="ddim", size=int(side))
        yield


def random_prompt(unet, pairs: int) -> Prompt:
    return Prompt(torch.randn(pairs, 77, unet.context_width), torch.randn(pairs, unet.pooled_width))


def pair_of_256_px(unet):
    return torch.randn(2, 4, 32, 32), torch.tensor([100, 700]), random_prompt(unet, 2)


@torch.no_grad()
def forward(folder: str):
    """The floor of a training step, and of an expert's calibration: a pair through the UNet."""
    denoiser = load_denoiser(Path(folder), torch.device("cpu"))
    yield
    for _ in range(2):
        denoiser.predict(*pair_of_256_px(denoiser.unet))
        yield


def step(folder: str, side: str, *flags: str):
    """A step of the published loss, on random latents of images of this side, in pixels."""
    args, side = train.parse_arguments(["--model", folder, *flags]), int(side) // 8
    device, precision = device_and_precision(args.device, args.precision)
    denoiser = load_denoiser(Path(folder), device, precision)
    denoiser.unet.checkpointing = args.checkpointing
    winner, loser = torch.randn(2, args.batch, 4, side, side)
    prompts = [random_prompt(denoiser.unet, n) for n in (args.batch, args.batch, 1)]
    parameters = lora.inject(denoiser.unet, lora.init(denoiser.unet, 4, 4, torch.Generator()))
    yield
    for number in range(3):
        train.train(denoiser, parameters, Pairs(winner, loser, *prompts), diffusion_dpo,
                    Path("no state"), {"concept": "bench"}, number, precision=precision, beta=5000,
                    lr=1e-5, steps=1, batch_size=args.batch, accumulate=1, caption_dropout=0)
        yield


def combine(experts: str, *flags: str):
    args = merge.parse_arguments([experts, *flags, "--out", f"{experts}/merged/out.safetensors"])
    yield
    merge.main(args)
    yield


@torch.no_grad()
def calibrated(folder: str, experts: str, method: str):
    """First all of calibration but the base pass: a forward is run before, and its layers' inputs
    serve for every expert. Last the merge, from files to memory."""
    denoiser = load_denoiser(Path(folder), torch.device("cpu"))
    experts = Experts([Path(experts)], [1.0])
    adaptable, met = lora.layers(denoiser.unet), {}
    for name in experts.names:
        adaptable[name][1].register_forward_pre_hook(
            lambda layer, args, name=name: met.update({name: lora.rows(layer, args[0])}))
    denoiser.predict(*pair_of_256_px(denoiser.unet))
    statistics = merge.statistics_of(met, method != "co-merge")
    yield
    for i in range(len(experts)):
        for name, f in experts.lora(i).items():
            statistics[name].add(met[name], 1.0, i, f)
    yield
    del denoiser, adaptable, met    # as merge.py does
    torch.set_num_threads(1)
    merge.merge(experts, merge.RULES[method], statistics, None, None, 0)
    yield
