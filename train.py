"""Step 2 of 4: one LoRA expert per harm category. `python train.py --concept hate`

What it is:  preference optimisation of a LoRA on the UNet's attention. The policy is the UNet with
             the LoRA, the reference the same UNet with it switched off. Read batches() and train().
Needs:       data/<concept>/latents.safetensors; the UNet of a Stable Diffusion (default: toy).
Gives:       experts/<concept>.safetensors, .jsonl (the log), .png (its curves), with a dot before
             their names while it trains. With --joint joint.safetensors, of all data: the baseline.
Interrupted: the same command continues, and gives the same expert, on a CPU to the bit: all that is
             random comes from generator(seed, name, step).
Many GPUs:   torchrun --nproc_per_node=N train.py ...; a step has N * --batch * --accumulate pairs.
Letters:     P pairs in all, S of a step, of all processes. "Released" code is Diffusion-DPO's.
"""
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from dpo import LOSSES, Batch
from model.data.pairs import Pairs, read_latents
from model.data.preview import previewer
from model.formats.checkpoint import encoder_files, unet_files
from model.formats.lora_file import save
from model.schedule import NoiseSchedule, stratified_times
from model.stable_diffusion import Denoiser, load, load_denoiser
from model.tools import processes
from model.tools.command import (BadInput, Parser, auto_or_positive, fraction, named,
                                 positive_float, positive_int, run)
from model.tools.device import PRECISIONS, device_and_precision
from model.tools.files import check_folder, sha256
from model.tools.training import (auto_beta, finished, forget, generator, load_state, save_state,
                                  summary, write_log)

WARM_UP = 10       # steps in which the rate rises [ours]
SAVE_EVERY = 50    # steps: what a power cut can cost
SHOWN = "loss", "accuracy", "winner", "winner_ref"    # beside the progress bar
# What an expert depends on, besides pairs and steps: part of its recipe.
CHOICES = ("loss", "beta", "lr", "schedule", "rank", "seed", "caption_dropout", "precision",
           "base_model_hash", "encoders_hash")


def parse_arguments(argv=None):
    parser = Parser("Trains one LoRA expert for each concept, by preference optimisation.")
    add = parser.add_argument
    add("--concept", default="all", help="a folder of --data; all trains one expert for each")
    add("--joint", action="store_true", help="one LoRA on all concepts, for all their steps")
    add("--data", type=Path, default=Path("data"), help="what make_data.py wrote")
    add("--out", type=Path, help="folder to write (default: experts; with --joint this one)")
    add("--loss", default="safety", help="safety, dpo, both (dpo.py), sft (fine-tuning on the "
        "winner), or a dotted name such as model.rivals.losses.duo")
    add("--beta", type=auto_or_positive, default=10.0, help="of the loss: near 2/delta (dpo.py), "
        "which is printed at the end; auto measures that first; published: 5000")
    add("--steps", type=positive_int, default=220, help="optimiser steps for each concept")
    add("--batch", type=positive_int, default=8, help="pairs that go through the UNet at once")
    add("--accumulate", type=positive_int, default=1, help="batches of one process in a step")
    add("--lr", type=positive_float, default=2e-3, help="AdamW's peak learning rate; published for "
        "SD 1.5: 1.6e-4 for the 16 pairs of a step")
    add("--schedule", choices=["cosine", "constant"], default="cosine", help="of the rate: cosine "
        f"rises {WARM_UP} steps, falls to 0; constant, as published, rises a quarter, then stays")
    add("--rank", type=positive_int, default=4, help="LoRA rank")
    add("--caption-dropout", type=fraction, default=0.0, help="chance that a pair loses "
        "both prompts in a step; published, with dpo: 0.2 (default: 0)")
    add("--checkpointing", action="store_true", help="less memory, a slower step")
    add("--compile", action="store_true", help="torch.compile the UNet: a slow start, fast steps")
    add("--preview", type=positive_int, metavar="N", help="every N steps draw the first two pairs' "
        "prompts, unblurred, in about two steps' time, with VAE and text encoders in memory")
    return parser.parse_args(argv)


def batches(pairs: Pairs, S: int, size: int, schedule: NoiseSchedule, dropout: float,
            device: torch.device, step: int, *key) -> Iterator[Batch]:
    """The S pairs of a step and all that is random about them, in the batches of `size` that this
    process takes through the UNet. All is drawn for the whole step, by the key: seed and name."""
    # Epochs, each a permutation of all P pairs, are laid end to end and cut into steps.
    P = len(pairs.winner)
    epochs = range(step * S // P, ((step + 1) * S - 1) // P + 1)
    order = torch.cat([torch.randperm(P, generator=generator(*key, "epoch", epoch))
                       for epoch in epochs])
    chosen = order[step * S - epochs[0] * P:][:S]

    rng = generator(*key, step)
    noise = torch.randn(S, *pairs.winner.shape[1:], generator=rng)
    t = stratified_times(S, schedule.T, rng)
    # These pairs train the preference under the empty prompt instead.
    dropped = torch.rand(S, generator=rng) < dropout
    whole = Batch(pairs.winner[chosen], pairs.loser[chosen], noise, t,
                  pairs.unsafe[chosen].replaced(dropped, pairs.empty),
                  pairs.safe[chosen].replaced(dropped, pairs.empty),
                  pairs.empty[torch.zeros_like(chosen)])
    for k in range(processes.RANK * size, S, processes.WORLD * size):
        yield Batch(*(field[k:k + size].to(device) for field in whole))


def train(denoiser: Denoiser, parameters: list, pairs: Pairs, loss_function: Callable,
          resume_file: Path, recipe: dict[str, str], seed: int, *, precision: str,
          beta: float | str, lr: float, steps: int, batch_size: int, accumulate: int,
          caption_dropout: float, constant: bool = False, show: Callable = iter) -> list[dict]:
    """Trains the parameters (of lora.inject()) on the pairs, in place. Returns the log, a row a
    step. Every SAVE_EVERY steps all is saved, and what was saved for the same recipe is continued;
    where beta is "auto", its number joins the recipe. show: wraps the steps, to draw previews.
    Raises BadInput where numbers are not finite."""
    schedule, device, name = denoiser.schedule, denoiser.device, recipe["concept"]
    parts = accumulate * processes.WORLD    # batches in a step, of all processes
    # Mixed precision by hand: the UNet computes in half precision; the LoRA, its gradients and the
    # loss are fp32. Only fp16 needs the scaler, since small gradients would be zero there.
    dtype = PRECISIONS[precision]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    # Weight decay, and clipping below, as in the released code.
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-2, fused=device.type == "cuda")

    def policy(x_t, t, prompt):
        # Entered for each call: until it is left, autocast keeps the half-precision copies that it
        # makes of the LoRA, and they must not outlive a step.
        with autocast:
            return denoiser.predict(x_t, t, prompt).float()

    def reference(x_t, t, prompt):
        with torch.no_grad(), lora.switched_off(denoiser.unet):
            return policy(x_t, t, prompt)

    if beta == "auto":
        beta = auto_beta(reference, pairs, schedule, device, name)
        recipe["beta_used"] = str(beta)
    log = load_state(resume_file, recipe, parameters, optimizer, scaler)
    processes.wait()    # until every process has read the file, since the first may delete it
    bar = tqdm(range(len(log), steps), initial=len(log), total=steps, leave=False,
               desc=f"{name:>16}", disable=processes.RANK > 0)
    for step in show(bar):
        warm_up = min(1, (step + 1) / (steps / 4 if constant else WARM_UP))
        decay = 1 if constant else 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_up * decay

        means = 0    # of the loss and the metrics, over the step
        for batch in batches(pairs, batch_size * parts, batch_size, schedule, caption_dropout,
                             device, step, seed, name):
            loss, metrics = loss_function(policy, reference, batch, schedule, beta)
            scaler.scale(loss / parts).backward()    # summed, the gradient of the step's mean
            means = means + torch.stack([loss, *map(torch.mean, metrics.values())]).detach() / parts
        processes.sum_over_all([means, *(parameter.grad for parameter in parameters)])

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)    # the same in all processes
        scaler.step(optimizer)    # fp16: leaves it out where gradients overflowed
        scaler.update()
        optimizer.zero_grad()

        skipped = scaler.is_enabled() and not norm.isfinite()
        denoiser.finite(means if skipped else torch.stack([*means, norm]),    # raises BadInput
                        f"{name}: the loss, or its gradient, at step {step}",
                        f"use a lower --lr ({lr:g}) or --beta ({beta:g})")
        row = dict(zip(("loss", *metrics), means.tolist()))
        log.append({"step": step, **row, **({"skipped": True} if skipped else {})})
        bar.set_postfix({key: f"{row[key]:.3f}" for key in SHOWN if key in row}, refresh=False)
        if (step + 1) % SAVE_EVERY == 0 and processes.RANK == 0:
            write_expert(resume_file.with_suffix(".safetensors"), denoiser, recipe, log)
            save_state(resume_file, recipe, log, parameters, optimizer, scaler)
    return log


def write_expert(path: Path, denoiser: Denoiser, recipe: dict[str, str], log: list[dict]):
    """The log, its curves, and last the LoRA. Its header counts the steps that were taken."""
    write_log(path, log)
    header = {"steps": str(len(log)), "prediction_type": denoiser.schedule.prediction_type}
    save(path, lora.extract(denoiser.unet), recipe | header)


def train_expert(s: Namespace, _, job: tuple[str, list[str], Path]) -> str:
    """job: (name, concepts, path). Trains one LoRA on the pairs of the concepts and writes it to
    the path, unless one of this recipe is there. Returns a summary. (_: None, from spread().)"""
    name, concepts, path = job
    pairs, steps = read_latents(s.data, concepts, s.encoders_hash), s.steps * len(concepts)
    recipe = {"concept": name, "steps": steps, "batch": s.batch * s.accumulate * processes.WORLD,
              "data_hash": sha256(*(s.data / c / "latents.safetensors" for c in concepts)),
              **{key: getattr(s, key) for key in CHOICES}}
    recipe = {key: str(value) for key, value in recipe.items()}
    resume_file = path.with_name(f".{path.stem}.resume")
    if finished(path, recipe):
        forget(resume_file)
        return f"{path}: already trained so on these pairs; delete it to train it again"
    check_folder(path.parent)

    loss_function = named("--loss", s.loss, LOSSES)
    if isinstance(loss_function, type):    # a class, which sees all pairs first
        loss_function = loss_function(pairs)
    denoiser = (load if s.preview else load_denoiser)(s.model, s.device, s.precision)
    rng = generator(s.seed, name, "lora")    # each expert has an A of its own
    parameters = lora.inject(denoiser.unet, lora.init(denoiser.unet, s.rank, s.rank, rng))
    denoiser.unet.checkpointing = s.checkpointing
    if s.compile:
        denoiser.unet.compile()
    show = previewer(path.with_suffix(".preview.png"), denoiser, s.data, concepts[0],
                     pairs.winner.shape[-1], s.preview)
    log = train(denoiser, parameters, pairs, loss_function, resume_file, recipe, s.seed,
                precision=s.precision, beta=s.beta, lr=s.lr, steps=steps, batch_size=s.batch,
                accumulate=s.accumulate, caption_dropout=s.caption_dropout,
                constant=s.schedule == "constant", show=show)
    if processes.RANK == 0:
        write_expert(path, denoiser, recipe, log)
        forget(resume_file)
    return f"{path}: {summary(log)}"


def main(args):
    device, precision = device_and_precision(args.device, args.precision)
    processes.start(device)
    unet = unet_files(args.model)
    s = Namespace(**{**vars(args), "device": device, "precision": precision},
                  base_model_hash=sha256(*unet), encoders_hash=sha256(*encoder_files(args.model)))
    named("--loss", s.loss, LOSSES)    # a wrong name fails before any process starts
    concepts = sorted(file.parent.name for file in s.data.glob("*/pairs.jsonl")
                      if s.concept in ("all", file.parent.name))
    if not concepts:
        raise BadInput(f"{s.data}: no pairs of {s.concept}; run make_data.py, or mend --concept")
    folder = s.out or Path("" if s.joint else "experts")
    experts = {"joint": concepts} if s.joint else {concept: [concept] for concept in concepts}
    jobs = [(name, experts[name], folder / f"{name}.safetensors") for name in experts]
    processes.say(f"{folder}/.*: what is learned so far, every {SAVE_EVERY} steps")
    workers = processes.processes_for(device, unet)
    for line in processes.spread(None, partial(train_expert, s), jobs, workers):
        processes.say(line)


if __name__ == "__main__":
    run(main, parse_arguments())
