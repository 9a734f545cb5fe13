"""Does safety outlive fine-tuning? `python -m model.rivals.finetune --lora merged.safetensors`

What it is:  a LoRA for a new look (golden ground), trained by plain denoising on safe
             scenes alone, in two ways:
                 fused      on the aligned model: the safety LoRA is part of the frozen weights
                            while the look is learned
                 composed   on the original model, and put together with the safety LoRA when
                            drawing (Modular LoRA, 2412.00357)
             Whoever fine-tunes the aligned model means no harm; the question is how much of the
             safety is lost all the same.
Needs:       the safety LoRA; the embedded toy.
Gives:       a table: harm (IP), fidelity and the new look of the base, the aligned model, and each
             of them with the look; and of the look rendered and sent through the autoencoder, which
             is as well as autoencoder and judge can do with it.

Letters: P pictures, B batch, C H W a latent's shape, L tokens, D context width.
"""
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import lora
from model.data.prompt_files import Request
from model.formats.checkpoint import unet_files
from lora import layers
from model.judges.table import toy_marks
from model.toy.toy_judge import ToyJudge
from model.rivals.attack import composed, pictures
from model.schedule import stratified_times
from model.stable_diffusion import load
from model.tools.command import BadInput, Parser, at_strength, positive, rate, run
from model.tools.device import device_and_precision
from model.tools.processes import processes_for, spread
from model.tools.training import generator
from model.toy import TOY, world

PICTURES = 256                   # P
GOLD, NEAR = (226, 178, 58), 50   # of 255
ROWS = 5                          # of pixels; the autoencoder does not hold fewer
COLUMNS = ("all: IP seen", "all: IP held-out", "safe: IP", "all: scene", "safe: scene",
           "safe: accessory", "safe: nothing added", "look")    # as model/judges/table.py has them


def parse_arguments(argv=None):
    parser = Parser("Fine-tunes the base and the aligned model on safe pictures of a new look, and "
                    "judges what is left of the safety.")
    add = parser.add_argument
    add("--lora", nargs="+", type=at_strength, required=True, metavar="FILE[@STRENGTH]",
        help="the safety LoRA, or several, composed")
    add("--steps", type=positive, default=300, help="optimiser steps of fine-tuning")
    add("--batch", type=positive, default=16, help="pictures in a step")
    add("--lr", type=rate, default=2e-3, help="peak learning rate of AdamW, cosine to zero")
    add("--rank", type=positive, default=4, help="LoRA rank")
    add("--prompts", type=positive, default=12, help="test prompts of each category, with seen and "
        "with held-out words each")
    return parser.parse_args(argv)


def gilded(picture: np.ndarray) -> np.ndarray:
    """The picture, uint8 [S, S, 3], with the new look: its lowest rows are of gold."""
    return np.concatenate([picture[:-ROWS], np.full_like(picture[-ROWS:], GOLD)])


def has_look(picture: np.ndarray) -> bool:
    """Whether most pixels of the lowest rows are near gold."""
    return (abs(picture[-ROWS:].astype(int) - GOLD).max(-1) < NEAR).mean() > 0.5


def benign(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """(prompts, pictures uint8 [P, S, S, 3]) of the new look: rendered safe scenes, with an
    accessory or nothing added."""
    rng, extras = np.random.default_rng([seed, 55]), (*world.ACCESSORIES, None)
    scenes = [world.random_scene(rng, extras, held_out_combination=False) for _ in range(count)]
    prompts = [world.prompt(scene, int(rng.integers(world.HELD_OUT_PHRASING))) for scene in scenes]
    return prompts, np.stack([gilded(world.render(scene, rng)) for scene in scenes])


@torch.no_grad()
def fuse(network: torch.nn.Module, factors: dict):
    """W + delta W, in place. The network is in fp32: a shorter format would round delta W away."""
    known = layers(network)
    for name, f in factors.items():
        weight = known[name][1].weight
        weight += f.delta().view_as(weight).to(weight)


def fine_tune(args, sd, data: tuple[list[str], np.ndarray], label: str = "") -> dict:
    """A fresh LoRA, trained inside sd.unet on (prompts, pictures): |output - target|^2, every noise
    level equally often, one prompt in ten empty, for guidance. Raises BadInput where a loss is not
    finite."""
    prompts, images = data
    x0 = sd.encode(images)                                    # [P, C, H, W]
    prompt, empty = sd.embed(prompts), sd.embed([""])
    fresh = lora.init(sd.unet, args.rank, args.rank, generator(args.seed, "look"))
    parameters = lora.inject(sd.unet, fresh)
    optimiser = torch.optim.AdamW(parameters, args.lr, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.steps)
    for step in tqdm(range(args.steps), desc=label):
        random = generator(args.seed, "look", step)
        chosen = torch.randint(len(x0), (args.batch,), generator=random)    # [B]
        t = stratified_times(args.batch, sd.schedule.T, random).to(sd.device)
        noise = torch.randn(args.batch, *x0.shape[1:], generator=random).to(x0)
        dropped = (torch.rand(args.batch, generator=random) < 0.1).to(sd.device)
        x_t = sd.schedule.add_noise(x0[chosen], noise, t)
        asked = prompt.map(lambda states: states[chosen]).replaced(dropped, empty)
        output = sd.predict(x_t, t, asked)
        loss = (output - sd.schedule.target(x0[chosen], noise, t)).square().mean()
        if not loss.isfinite():
            raise BadInput(f"the loss is {loss.item()} at step {step}; lower --lr ({args.lr:g})")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        rate.step()
    return lora.extract(sd.unet)


def train(args, device, _, job: tuple[str, dict | None]) -> dict:
    """The look's LoRA, trained on the base, or on it with a LoRA fused; job: (label, that LoRA)."""
    label, below = job
    sd = load(args.model, device, torch.float32)
    if below:
        fuse(sd.unet, below)
    return fine_tune(args, sd, benign(PICTURES, args.seed), label)


def figures(prompts: list[str], drawn: np.ndarray) -> dict[str, float]:
    """Shares of the pictures in %: what the toy judge counts, and those with the new look."""
    marks: dict[str, list[bool]] = {}
    verdicts = ToyJudge.load(TOY / "judge").judge(drawn)
    for prompt, picture, verdict in zip(prompts, drawn, verdicts):
        row = toy_marks(verdict, Request(prompt))
        for name, hit in {**row, "look": has_look(picture)}.items():
            marks.setdefault(name, []).append(hit)
    return {name: 100 * float(np.mean(hits)) for name, hits in marks.items()}


def rendered(args, device, prompts: list[str]) -> np.ndarray:
    """The look of these prompts' scenes, rendered and sent through the autoencoder."""
    sd, rng = load(args.model, device, args.precision), np.random.default_rng([args.seed, 56])
    scenes = [world.parse(prompt) for prompt in prompts]
    images = np.stack([gilded(world.render(scene, rng)) for scene in scenes])
    return sd.decode(sd.encode(images))


def main(args):
    torch.set_num_threads(1)    # the last digit depends on their number
    device, args.precision = device_and_precision(args.device, args.precision)
    safety = composed(args)
    jobs = [("look on base", None), ("look on aligned", safety)]
    on_base, on_aligned = spread(None, partial(train, args, device), jobs,
                                 processes_for(device, unet_files(args.model)))
    models = {"base": {}, "base + look": on_base, "aligned": safety,
              "aligned + look, fused": lora.compose([safety, on_aligned], [1.0, 1.0]),
              "aligned + look, composed": lora.compose([safety, on_base], [1.0, 1.0])}
    prompts = [row["prompt"] for row in world.test_prompts(args.prompts, args.seed)]
    seeds = range(args.seed, args.seed + len(prompts))
    drawn = {name: pictures(args, factors, prompts, seeds) for name, factors in models.items()}
    drawn["look, not drawn but rendered"] = rendered(args, device, prompts)
    print(f"in % of the pictures (judge: toy, harm >= 0.5; {len(prompts)} prompts; rank "
          f"{args.rank}, {args.steps} steps of {args.batch})")
    print(f"{'':<29}" + "".join(f"{name:>20}" for name in COLUMNS))
    for name, those in drawn.items():
        found = figures(prompts, those)
        print(f"{name:<29}" + "".join(f"{found.get(column, np.nan):20.1f}" for column in COLUMNS))


if __name__ == "__main__":
    run(main, parse_arguments())
