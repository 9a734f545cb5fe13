"""How much does rounding move the logit of Diffusion-DPO? `python -m model.lab.rounding`

What it is:  the logits beta/2 * margin in fp32 and in cheaper arithmetics (COLUMNS), with the same
             pairs, noise, timesteps and LoRA, trained in fp32 by our or the published recipe.
Needs:       the UNet of a Stable Diffusion (default: the toy). The pairs are random.
Gives:       a Markdown table by beta and thirds of t: the logit in fp32, and how far the others are
             from it, both as the root of the mean square over pairs.
"""
from functools import partial
from pathlib import Path

import torch

import train
from dpo import errors_of
from model.stable_diffusion import skeleton
from model.tools.command import PlainParser, natural, positive, run
from model.tools.training import generator
from model.toy import TOY

RECIPES = {10: "--loss dpo --beta 10", 5000: "--loss dpo --beta 5000 --lr 1.6e-4"}
PARTS = {"bf16 convolutions": torch.nn.Conv2d, "bf16 linear layers": torch.nn.Linear}
COLUMNS = "bf16", "fp16", *PARTS    # PARTS: where it comes from, all else in fp32


def parse_arguments(argv=None):
    parser = PlainParser("Measures how much rounding moves the logit of the loss.")
    add = parser.add_argument
    add("--model", type=Path, default=TOY, help="as of train.py (default: the embedded toy)")
    add("--pairs", type=positive, default=24, help="how many")
    add("--side", type=positive, default=8, help="of a latent")
    add("--steps", type=natural, default=1, help="of training, before it is measured")
    return parser.parse_args(argv)


def random_pairs(args) -> dict[str, torch.Tensor]:
    """What latents.safetensors holds, as far as this loss reads it."""
    unet, latent = skeleton(args.model), (args.pairs, 4, args.side, args.side)
    states = args.pairs, 77 + bool(unet.pooled_width), unet.context_width
    sizes = {"winner": latent, "loser": latent, "unsafe": states, "empty": (1, *states[1:])}
    return {name: torch.randn(size, generator=generator(name)) for name, size in sizes.items()}


def in_bf16(forward, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return forward(x).float()


def trainer_of(args, beta: int, column: str) -> train.Trainer:
    """A fresh one, in the arithmetic that the column names."""
    flags = ["--precision", "fp32" if column in PARTS else column, "--model", str(args.model)]
    options = train.parse_arguments([*flags, *RECIPES[beta].split()])
    trainer = train.Trainer(options, torch.device("cpu"), "rounding", random_pairs(args))
    for layer in trainer.denoiser.unet.modules():
        if column in PARTS and isinstance(layer, PARTS[column]):
            layer.forward = partial(in_bf16, layer.forward)
    return trainer


@torch.no_grad()
def logits(trainer: train.Trainer, learner: train.Trainer) -> torch.Tensor:
    """[3, P], with the learner's LoRA: of each third of t, from low to high."""
    for own, value in zip(trainer.parameters, learner.parameters):
        own.copy_(value)
    margins, T = [], trainer.denoiser.schedule.T
    for third in range(3):
        draw = trainer.draw(torch.arange(len(trainer.tensors["winner"])), "rounding", third)
        draw["t"] = (third * T + draw["t"]) // 3
        (policy, target), reference = trainer.ask(draw), trainer.ask_reference(draw)
        winner, loser, winner_ref, loser_ref = errors_of(policy, reference, target)
        margins.append((loser - loser_ref) - (winner - winner_ref))
    return trainer.args.beta / 2 * torch.stack(margins)


def main(args):
    torch.set_num_threads(1)    # the last digit depends on their number
    print(f"| β | t | logit in fp32 | {' | '.join(COLUMNS)} |\n{'|---' * (3 + len(COLUMNS))}|")
    for beta in RECIPES:
        learner = trainer_of(args, beta, "fp32")
        for step in range(args.steps):
            learner.take_step(step, 110)
        exact = logits(learner, learner)
        wrong = [logits(trainer_of(args, beta, name), learner) - exact for name in COLUMNS]
        for third, name in enumerate(("low", "middle", "high")):
            cells = [f"{x[third].square().mean().sqrt():.4f}" for x in (exact, *wrong)]
            print(f"| {beta} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run(main, parse_arguments())
