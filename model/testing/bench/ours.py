"""This project's jobs, each a generator (clock.py)."""
from pathlib import Path

import torch

import merge
import train
from model.formats.experts import Experts
from model.stable_diffusion import load, load_denoiser, skeleton
from model.tools.device import pick_device

CPU = torch.device("cpu")


def picture(folder: str, device: str, dtype: str, side: str, steps: str):
    sd = load(Path(folder), torch.device(device), getattr(torch, dtype))
    yield
    for _ in range(2):
        sd.generate(["a red ball"], [0], int(steps), 4.0, sampler="ddim", size=int(side))
        yield


def random_pair(denoiser) -> tuple:
    """(x_t, t, context) of two pictures of 256 px."""
    context = torch.randn(2, 77, denoiser.unet.context_width)
    return torch.randn(2, 4, 32, 32), torch.tensor([100, 700]), context


def forward(folder: str):
    """The floor of a training step: a pair through the UNet, once."""
    denoiser = load_denoiser(Path(folder), CPU)
    batch = random_pair(denoiser)
    yield
    with torch.no_grad():
        for _ in range(2):
            denoiser.predict(*batch)
            yield


def random_pairs(folder: str, side: str, pairs: int) -> dict[str, torch.Tensor]:
    """What make_data.py would write of pictures of this side, in pixels."""
    unet, side = skeleton(Path(folder)), int(side) // 8
    words = (77 + bool(unet.pooled_width), unet.context_width)
    tensors = {key: torch.randn(pairs, 4, side, side) for key in ("winner", "loser")}
    tensors |= {key: torch.randn(pairs, *words) for key in ("safe", "unsafe")}
    return {**tensors, "empty": torch.randn(1, *words)}


def step(folder: str, side: str, *flags: str):
    """A step of the published loss, on random latents."""
    args = train.parse_arguments(["--model", folder, "--loss", "dpo", "--beta", "5000", *flags])
    tensors = random_pairs(folder, side, args.batch)
    trainer = train.Trainer(args, pick_device(args.device), "bench", tensors)
    yield
    for number in range(3):
        trainer.take_step(number, 100)
        yield


def combine(experts: str, *flags: str):
    args = merge.parse_arguments([experts, *flags, "--out", f"{experts}/merged/out.safetensors"])
    yield
    merge.main(args)
    yield


def co_merge(folder: str, experts: str, side: str, device: str):
    """The whole of merge.py, calibrated on random pairs."""
    tensors = random_pairs(folder, side, merge.CALIBRATION_PAIRS)
    merge.read_latents = lambda *where: tensors
    yield from combine(experts, "--model", folder, "--device", device)


def score(folder: str, experts: str):
    """Co-Merge's pass of what forward() takes."""
    denoiser, paths = load_denoiser(Path(folder), CPU), sorted(Path(experts).glob("*.safetensors"))
    batch = random_pair(denoiser)
    parts = list(Experts(paths, [1.0]).layers())
    with torch.no_grad():
        denoiser.predict(*batch)
    yield
    merge.measure(denoiser, parts, [(0, *batch)])
    yield
