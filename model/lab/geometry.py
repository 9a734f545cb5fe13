"""How alike are the experts, and how near is Co-Merge's approximation? `python -m
model.lab.geometry experts/*`

What it is:  cosines between the experts' delta W, and between the gradients with respect to W that
             their training started with. Near 0: each problem has a direction of its own. Near 1:
             one direction would do for all. And a second pass: Co-Merge scores experts on what the
             base's layers meet; what if it were what the merged model's layers meet?
Needs:       experts, and the data that they were trained on; the embedded toy.
Gives:       a table of means with the lowest and highest pair, by kind of layer; the share of rows
             that keep their owner in the second pass; and what it merges, --out.
"""
from itertools import combinations
from pathlib import Path

import torch

import lora
import merge
import train
from model.data.pairs import read_latents
from model.formats.checkpoint import encoder_files
from model.formats.experts import Experts
from model.formats.lora_file import expand, load, save
from model.lab.experiments import mean_and_range
from model.stable_diffusion import load_denoiser
from model.tools.command import Parser, run
from model.tools.device import device_and_precision
from model.tools.files import sha256

PAIRS = 64    # of each concept, for the gradient
KINDS = [f"attn{n}_to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out_0")]


def parse_arguments(argv=None):
    parser = Parser("Cosines between experts, and between the gradients that they started with.")
    parser.add_argument("experts", nargs="+", type=Path, help="LoRA files, or a folder of them")
    parser.add_argument("--data", type=Path, default=Path("data"), help="what make_data.py wrote")
    parser.add_argument("--out", type=Path, default=Path("second-pass.safetensors"),
                        help="LoRA file to write: Co-Merge's, of the second pass")
    return parser.parse_args(argv)


def inner(f: lora.Factors, g: lora.Factors) -> float:
    """<delta W_f, delta W_g>, without writing either down."""
    return (f.scale * g.scale * (f.up.T @ g.up) * (f.down @ g.down.T)).sum().item()


def gradients(args, concept: str) -> dict[str, torch.Tensor]:
    """{layer: d loss / d W [O, I]} at the first step, where policy and reference agree."""
    device, precision = device_and_precision(args.device, args.precision)
    options = train.parse_arguments(["--model", str(args.model), "--seed", str(args.seed),
                                     "--precision", precision])
    tensors = read_latents(args.data, [concept], sha256(*encoder_files(args.model)))
    trainer = train.Trainer(options, device, concept, tensors)
    adapted = {lora.flat(name): module for name, module in trainer.denoiser.unet.named_modules()
               if isinstance(module, lora.LoRALayer)}
    for layer in adapted.values():
        layer.base.weight.requires_grad_(True)
    draw = trainer.draw_step(0, PAIRS)
    reference, (policy, target) = trainer.ask_reference(draw), trainer.ask(draw)
    trainer.loss.function(policy, reference, target, options.beta)[0].backward()
    return {name: layer.base.weight.grad for name, layer in adapted.items()}


def cosines(vectors: list[dict], product) -> dict[str, list[float]]:
    """{kind of layer: the cosine of each pair in %, over all layers of the kind together}."""
    found = {kind: [] for kind in KINDS}
    for a, b in combinations(vectors, 2):
        for kind in KINDS:
            ab, aa, bb = (total(u, v, kind, product) for u, v in ((a, b), (a, a), (b, b)))
            found[kind].append(100 * ab / (aa * bb) ** 0.5)
    return found


def total(u: dict, v: dict, kind: str, product) -> float:
    """The inner product of two vectors, over all layers of a kind."""
    return sum(product(u[name], v[name]) for name in u if name.endswith(kind))


def second_pass(args, files: list[Path]) -> float:
    """Merges by Co-Merge, scores the experts anew on what the layers of the merged model meet, and
    writes what Co-Merge makes of that. Returns the share of rows, in the mean of layers, that have
    the same owner."""
    options = merge.parse_arguments([*map(str, files), "--model", str(args.model), "--data",
                                     str(args.data), "--seed", str(args.seed)])
    device, options.precision = device_and_precision(options.device, options.precision)
    experts, denoiser = Experts(files, [1.0]), load_denoiser(args.model, device)
    activity = merge.calibrate(options, experts)
    known = lora.layers(denoiser.unet)
    for name, factors in merge.merge(options, experts, activity)[0].items():
        known[name][1].weight += factors.delta()
    concepts = [file.metadata["concept"] for file in experts.files]
    encoders = sha256(*encoder_files(args.model))
    inputs = merge.calibration(options, concepts, encoders, denoiser)
    again = merge.measure(denoiser, experts.layers(), inputs)
    save(args.out, merge.merge(options, experts, again)[0], experts.metadata)
    kept = [(again[name].owner == activity[name].owner).float().mean() for name in activity]
    return torch.stack(kept).mean().item()


def main(args):
    torch.set_num_threads(1)
    files = expand(args.experts)
    experts, metadata = zip(*map(load, files))
    of_changes = cosines(experts, inner)
    starts = [gradients(args, one["concept"]) for one in metadata]
    of_gradients = cosines(starts, lambda a, b: (a * b).sum().item())
    print("| layers | ΔW of the experts | gradients at the first step |\n|---|---|---|")
    for kind in KINDS:
        cells = [mean_and_range(found[kind]) for found in (of_changes, of_gradients)]
        print(f"| {kind} | {' | '.join(cells)} |")
    print("cosines of all pairs of experts, in %: mean (lowest–highest)")
    kept = second_pass(args, files)
    print(f"{args.out}: scored on the merged model's inputs, {kept:.1%} of rows keep their owner")


if __name__ == "__main__":
    run(main, parse_arguments())
