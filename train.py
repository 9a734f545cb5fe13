"""Step 2 of 4: one LoRA expert per harm category. `python train.py --concept hate`

What it is:  preference optimisation of a LoRA on the UNet's attention, on the pairs of
             make_data.py. The policy is the UNet with the LoRA, the reference the same UNet with
             the LoRA switched off.
Needs:       data/<concept>/latents.safetensors; the UNet of a Stable Diffusion (default: toy).
Gives:       experts/<concept>.safetensors, .jsonl (the log) and .png (its curves); with --joint
             joint.safetensors, the paper's baseline, one LoRA on all the data.
Interrupted: the same command continues at the last saved step, and gives the same expert, on a CPU
             to the bit: all that is random comes from generator(seed, name, step).
Many GPUs:   torchrun --nproc_per_node=N train.py ...; a step has N * --batch * --accumulate pairs.

Letters: P pairs, B of them in a step, C H W a latent's shape, L tokens, D context width, n inputs
of a loss.
"""
import math
import pkgutil
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from dpo import LOSSES, Loss
from model.data.pairs import read_latents
from model.formats.checkpoint import encoder_files, unet_files
from model.formats.lora_file import LoRAFile, save
from model.schedule import stratified_times
from model.stable_diffusion import load_denoiser
from model.tools import processes
from model.tools.command import BadInput, Parser, natural, positive, rate, run, share
from model.tools.device import device_and_precision
from model.tools.files import check_folder, sha256
from model.tools.training import (generator, load_state, mixed_precision, save_state, set_rate,
                                  summary, write_log)

SAVE_EVERY = 50    # steps: what a power cut can cost


def loss_named(name: str) -> Loss:
    """A loss of dpo.py by its name, or any other by its dotted name."""
    try:
        loss = LOSSES[name] if name in LOSSES else pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        loss = None
    if not isinstance(loss, Loss):
        raise BadInput(f"--loss {name}: there is no such loss; use {' or '.join(LOSSES)}, or the "
                       "dotted name of a dpo.Loss, such as model.rivals.losses.duo")
    return loss


def parse_arguments(argv=None):
    parser = Parser("Trains one LoRA expert for each concept, by preference optimisation.")
    add = parser.add_argument
    add("--concept", default="all", help="a folder of --data, or all, one expert each")
    add("--joint", action="store_true", help="train one LoRA on all concepts instead, for as many "
        "steps as all experts together")
    add("--data", type=Path, default=Path("data"), help="what make_data.py wrote")
    add("--out", type=Path,
        help="folder to write (default: experts; with --joint the current folder)")
    add("--loss", default="safety", help="safety: DPO, and safe prompts draw what they drew; dpo: "
        "as published; sft: fine-tuning on the winner, and safe prompts as before; or a dotted "
        "name, such as model.rivals.losses.duo")
    add("--beta", type=rate, default=10.0, help="how steep the preference is in the MEAN squared "
        "error, and with safety the weight of what stays; published: 5000")
    add("--steps", type=positive, default=110, help="optimiser steps for each concept")
    add("--batch", type=positive, default=8,
        help="pairs that one process takes through the UNet at once")
    add("--accumulate", type=positive, default=1, help="batches in a step: so many times the "
        "pairs, in the memory of one batch")
    add("--lr", type=rate, default=2e-3, help="peak learning rate of AdamW, cosine to zero; "
        "published for SD 1.5: 1e-5 times the 16 pairs of a step, constant")
    add("--rank", type=positive, default=4, help="LoRA rank")
    add("--caption-dropout", type=share, default=0.0, help="share of pairs whose prompts are empty "
        "in a step; published: 0.2 (default: 0)")
    add("--reuse", type=natural, default=0, help="draw timestep and noise only so many times for "
        "each pair, and ask the reference once, before the first step; 0 draws anew in every step "
        "(default: 0)")
    add("--checkpointing", action="store_true", help="compute activations twice instead of keeping "
        "them: less memory, a slower step")
    add("--compile", action="store_true", help="torch.compile the UNet: a slow start, fast steps")
    return parser.parse_args(argv)


def pairs_of_step(P: int, B: int, step: int, *seed) -> torch.Tensor:
    """The pairs [B] of a step. Epochs, each a permutation of all P pairs, are laid end to end and
    cut into steps: every pair comes once before any comes again."""
    first, last = step * B // P, ((step + 1) * B - 1) // P
    order = torch.cat([torch.randperm(P, generator=generator(*seed, "epoch", epoch))
                       for epoch in range(first, last + 1)])
    return order[step * B - first * P:][:B]


def draw_noise(pairs: torch.Tensor, shape, T: int, dropout: float,
               random: torch.Generator) -> dict[str, torch.Tensor]:
    """All that is random about these pairs [B], drawn ONCE for each pair, so that winner and loser
    differ in their content alone. Processes and --accumulate share a step out: it is drawn whole,
    and then cut."""
    B = len(pairs)
    quarter = int(B / 4 + torch.rand((), generator=random))    # of a single pair: 1 in 4 steps
    return {"pair": pairs, "t": stratified_times(B, T, random),
            "noise": torch.randn(B, *shape, generator=random),
            "quarter": torch.randperm(B, generator=random) < quarter,
            "dropped": torch.rand(B, generator=random) < dropout}


def noised(tensors, draw, picture: str, schedule):
    """(x_t [B, C, H, W], t [B], target [B, C, H, W]): the winner or loser of each pair with noise,
    or the "noise" alone, and what the UNet should say to it."""
    t, noise = draw["t"], draw["noise"]
    if picture == "noise":
        last = torch.full_like(t, schedule.T - 1)
        return noise, last, schedule.target(torch.zeros_like(noise), noise, last)
    x0 = tensors[picture][draw["pair"]]
    return schedule.add_noise(x0, noise, t), t, schedule.target(x0, noise, t)


def contexts(tensors, draw, prompt: str) -> torch.Tensor:
    """The states [B, L, D] of the pairs' prompts: unsafe, safe, empty, or "safe or empty"."""
    kind, _, sometimes_empty = prompt.partition(" or ")
    if kind == "empty":
        return tensors["empty"].expand(len(draw["pair"]), -1, -1)
    empty = draw["dropped"] | draw["quarter"] if sometimes_empty else draw["dropped"]
    return torch.where(empty[:, None, None], tensors["empty"], tensors[kind][draw["pair"]])


class Trainer:
    """An expert in the making: the UNet with its LoRA, the optimiser, and the log, a row a step."""

    def __init__(self, args, device: torch.device, name: str, tensors: dict[str, torch.Tensor]):
        self.args, self.tensors, self.loss, self.log = args, tensors, loss_named(args.loss), []
        self.seed, self.shape = (args.seed, name), tensors["winner"].shape[1:]
        self.of_pairs = self.loss.of_pairs(tensors)
        self.denoiser = load_denoiser(args.model, device, args.precision)
        unet = self.denoiser.unet
        # Every expert has its own LoRA initialisation.
        fresh = lora.init(unet, args.rank, args.rank, generator(*self.seed, "lora"))
        self.parameters = lora.inject(unet, fresh)
        unet.checkpointing = args.checkpointing
        if args.compile:
            unet.compile()
        self.optimiser = torch.optim.AdamW(self.parameters, args.lr, weight_decay=1e-2,
                                           fused=device.type == "cuda")
        self.cast, self.scaler = mixed_precision(device, args.precision)
        self.fixed = self.draw_fixed() if args.reuse else None

    def ask(self, draw) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(outputs, targets): for each input of the loss [B, C, H, W], as the LoRA is switched."""
        asked = [name.split("|") for name in self.loss.inputs]
        schedule = self.denoiser.schedule
        parts = [noised(self.tensors, draw, picture, schedule) for picture, _ in asked]
        context = torch.cat([contexts(self.tensors, draw, prompt) for _, prompt in asked])
        x_t, t, target = (torch.cat(part).to(self.denoiser.device) for part in zip(*parts))
        with self.cast:
            output = self.denoiser.predict(x_t, t, context.to(self.denoiser.device))
        return output.float().chunk(len(asked)), target.chunk(len(asked))

    def ask_reference(self, draw) -> list[torch.Tensor]:
        if "reference" in draw:
            return draw["reference"].to(self.denoiser.device).unbind(1)
        with torch.no_grad(), lora.switched_off(self.denoiser.unet):
            return self.ask(draw)[0]

    def draw(self, pairs: torch.Tensor, *what) -> dict[str, torch.Tensor]:
        return draw_noise(pairs, self.shape, self.denoiser.schedule.T, self.args.caption_dropout,
                          generator(*self.seed, *what))

    def draw_fixed(self) -> dict[str, torch.Tensor]:
        """--reuse K: K draws for each pair with the reference's outputs "reference" [K P, n, C, H,
        W], which are constants. Entry k P + i is draw k of pair i."""
        P, draws = len(self.tensors["winner"]), []
        for k in range(self.args.reuse):
            # Shuffled: any pair may get any slice of t.
            shuffled = torch.randperm(P, generator=generator(*self.seed, "reuse", k))
            draw = self.draw(shuffled, "fixed", k)
            draws.append({key: value[shuffled.argsort()] for key, value in draw.items()})
        fixed = {key: torch.cat([draw[key] for draw in draws]) for key in draws[0]}
        parts = cut(fixed, self.args.batch)
        answers = [torch.stack(self.ask_reference(part), 1).cpu()
                   for part in tqdm(parts, desc="reference", leave=False)]
        return {**fixed, "reference": torch.cat(answers)}

    def draw_step(self, step: int, B: int) -> dict[str, torch.Tensor]:
        P = len(self.tensors["winner"])
        pairs = pairs_of_step(P, B, step, *self.seed)
        if not self.fixed:
            return self.draw(pairs, step)
        k = torch.randint(self.args.reuse, (B,), generator=generator(*self.seed, step))
        return {key: value[k * P + pairs] for key, value in self.fixed.items()}

    def take_step(self, step: int, steps: int) -> dict[str, float]:
        """One optimiser step. Returns its row of the log."""
        set_rate(self.optimiser, self.args.lr, step, steps)
        number = self.args.accumulate * processes.WORLD    # of parts
        parts = cut(self.draw_step(step, self.args.batch * number), self.args.batch)
        sums = 0
        for part in parts[processes.RANK::processes.WORLD]:
            reference = self.ask_reference(part)
            policy, target = self.ask(part)
            extra = [] if self.of_pairs is None else [self.of_pairs[part["pair"]]]
            loss, values = self.loss.function(policy, reference, target, self.args.beta, *extra)
            self.scaler.scale(loss / number).backward()    # the sum over parts is the step's mean
            sums = sums + torch.stack([loss.detach(), *values.values()]) / number
        processes.add_up([sums, *(p.grad for p in self.parameters)])
        row = dict(zip(("loss", *values), sums.tolist()))
        if not math.isfinite(row["loss"]):
            self.denoiser.finite(reference[0], "the reference")    # of a damaged checkpoint?
            raise BadInput(f"{self.seed[1]}: the loss is {row['loss']} at step {step}; use a lower "
                           f"--lr ({self.args.lr:g}) or --beta ({self.args.beta:g})")
        self.scaler.unscale_(self.optimiser)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)    # of the sum: all clip alike
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        self.log.append({"step": step, **row})
        return self.log[-1]


def cut(draw: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """A draw in parts of `size` pairs."""
    parts = zip(*(value.split(size) for value in draw.values()))
    return [dict(zip(draw, part)) for part in parts]


def train(args, device: torch.device, _, job) -> str:
    """job: (name, concepts, path). Trains one LoRA on the pairs of the concepts and writes it to
    the path. Returns a line that sums it up. A finished expert of the same plan is left alone."""
    name, concepts, path = job
    tensors, steps = read_latents(args.data, concepts, args.encoders), args.steps * len(concepts)
    plan = {"concept": name, "base_model_hash": args.base_hash, "encoders_hash": args.encoders,
            "data_hash": sha256(*(args.data / c / "latents.safetensors" for c in concepts)),
            "steps": str(steps), "batch": str(args.batch * args.accumulate * processes.WORLD)}
    plan |= {key: str(getattr(args, key))
             for key in ("loss", "beta", "lr", "rank", "seed", "caption_dropout", "reuse",
                         "precision")}
    state = path.with_name(f".{path.stem}.resume")
    if path.is_file() and plan.items() <= LoRAFile(path).metadata.items():
        state.unlink(missing_ok=True)
        return f"{path}: already trained so on these pairs; delete it to train it again"
    check_folder(path.parent)
    trainer = Trainer(args, device, name, tensors)
    trained = trainer.parameters, trainer.optimiser, trainer.scaler
    trainer.log = load_state(state, plan, *trained)
    processes.wait()    # until every process has read it
    bar = tqdm(range(len(trainer.log), steps), initial=len(trainer.log), total=steps, leave=False,
               desc=f"{name:>16}", position=processes.slot(), disable=processes.RANK > 0)
    for step in bar:
        row = trainer.take_step(step, steps)
        bar.set_postfix({key: f"{row[key]:.3f}" for key in ("loss", "preference", "accuracy")},
                        refresh=False)
        if (step + 1) % SAVE_EVERY == 0 and processes.RANK == 0:
            save_state(state, plan, trainer.log, *trained)
    if processes.RANK == 0:
        write_log(path, trainer.log)
        prediction = trainer.denoiser.schedule.prediction_type
        save(path, lora.extract(trainer.denoiser.unet), {**plan, "prediction_type": prediction})
        state.unlink(missing_ok=True)
    return f"{path}: {summary(trainer.log)}"


def main(args):
    device, args.precision = device_and_precision(args.device, args.precision)
    processes.start(device)
    found = sorted(file.parent.name for file in args.data.glob("*/pairs.jsonl"))
    if args.concept == "all" and not found:
        raise BadInput(f"{args.data}: no concept has pairs yet; run python make_data.py")
    concepts = found if args.concept == "all" else [args.concept]
    args.base_hash = sha256(*unet_files(args.model))
    args.encoders = sha256(*encoder_files(args.model))
    folder = args.out or Path("" if args.joint else "experts")
    jobs = [(concept, [concept], folder / f"{concept}.safetensors") for concept in concepts]
    if args.joint:
        jobs = [("joint", concepts, folder / "joint.safetensors")]
    number = processes.processes_for(device, unet_files(args.model))
    for line in processes.spread(None, partial(train, args, device), jobs, number):
        if processes.RANK == 0:
            tqdm.write(line)


if __name__ == "__main__":
    run(main, parse_arguments())
