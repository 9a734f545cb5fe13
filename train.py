"""Step 2 of 4: one LoRA expert per harm category. `python train.py --concept hate`

What it is:  preference optimisation of a LoRA on the UNet's attention, on the pairs of
             make_data.py. The policy is the UNet with the LoRA, the reference the same UNet with
             the LoRA switched off. The lesson is train() and batch_of_step(); the rest is command
             line and files.
Needs:       data/<concept>/latents.safetensors; the UNet of a Stable Diffusion (default: toy).
Gives:       experts/<concept>.safetensors, .jsonl (the log) and .png (its curves); with --joint
             joint.safetensors, the paper's baseline, one LoRA on all the data. While it trains, the
             same three, of what is learned so far, have a dot before their names.
Interrupted: the same command continues at the last saved step, and gives the same expert, on a CPU
             to the bit: all that is random comes from generator(seed, name, step).
Many GPUs:   torchrun --nproc_per_node=N train.py ...; a step has N * --batch * --accumulate pairs.

Letters: P pairs in all, S of a step (of all processes), T timesteps. Where the code is said to be
"released", it is that of Diffusion-DPO.
"""
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import lora
from dpo import LOSSES, Batch
from model.data.pairs import Pairs, read_latents
from model.formats.checkpoint import encoder_files, unet_files
from model.formats.lora_file import LoRAFile, save
from model.schedule import stratified_times
from model.stable_diffusion import Denoiser, load_denoiser
from model.tools import processes
from model.tools.command import (BadInput, Parser, auto_or_positive, fraction, named,
                                 positive_float, positive_int, run)
from model.tools.device import PRECISIONS, device_and_precision
from model.tools.files import check_folder, sha256
from model.tools.training import (auto_beta, forget, generator, load_state, save_state, summary,
                                  write_log)

WARM_UP = 10       # steps in which the rate rises [ours]; of a constant rate a quarter of all steps
SAVE_EVERY = 50    # steps: what a power cut can cost
SHOWN = "loss", "accuracy", "winner", "winner_ref"    # beside the progress bar


class Settings(NamedTuple):
    """The command line, resolved, and hashes of the files that training starts from."""
    concept: str
    joint: bool
    data: Path
    out: Path | None
    loss: str
    beta: float | str
    steps: int
    batch: int
    accumulate: int
    lr: float
    schedule: str
    rank: int
    caption_dropout: float
    checkpointing: bool
    compile: bool
    model: Path
    seed: int
    device: torch.device
    precision: str
    base_model_hash: str
    encoders_hash: str


def parse_arguments(argv=None):
    parser = Parser("Trains one LoRA expert for each concept, by preference optimisation.")
    add = parser.add_argument
    add("--concept", default="all", help="a folder of --data; all trains one expert for each")
    add("--joint", action="store_true", help="train one LoRA on all of --concept instead, for as "
        "many steps as its experts together")
    add("--data", type=Path, default=Path("data"), help="what make_data.py wrote")
    add("--out", type=Path,
        help="folder to write (default: experts; with --joint the current folder)")
    add("--loss", default="safety", help="safety: DPO, and safe prompts keep what they gave; dpo: "
        "Diffusion-DPO; both: the same under the safe prompt too; sft: fine-tuning on the winner; "
        "or a dotted name, such as model.rivals.losses.duo")
    add("--beta", type=auto_or_positive, default=10.0, help="what multiplies the differences of "
        "mean squared errors, and with safety the drift's weight too: near the 2/delta that is "
        "printed at the end, 10 for the toy; auto asks the base model for it; published: 5000")
    add("--steps", type=positive_int, default=220, help="optimiser steps for each concept")
    add("--batch", type=positive_int, default=8,
        help="pairs that one process takes through the UNet at once")
    add("--accumulate", type=positive_int, default=1, help="batches in a step: so many times the "
        "pairs, in the memory of one batch")
    add("--lr", type=positive_float, default=2e-3, help="peak learning rate of AdamW; published "
        "for SD 1.5: 1.6e-4 for the 16 pairs of a step")
    add("--schedule", choices=["cosine", "constant"], default="cosine", help="of the rate: rises "
        f"for {WARM_UP} steps, then cosine to zero; or rises for a quarter of the steps, then "
        "constant, as published")
    add("--rank", type=positive_int, default=4, help="LoRA rank")
    add("--caption-dropout", type=fraction, default=0.0, help="share of pairs whose prompts are "
        "empty in a step; published: 0.2 (default: 0)")
    add("--checkpointing", action="store_true", help="compute activations twice instead of keeping "
        "them: less memory, a slower step")
    add("--compile", action="store_true", help="torch.compile the UNet: a slow start, fast steps")
    return parser.parse_args(argv)


def pairs_of_step(P: int, S: int, step: int, *key) -> torch.Tensor:
    """The numbers [S] of a step's pairs. Epochs, each a permutation of all P pairs, are laid end to
    end and cut into steps: each epoch has every pair once."""
    first, last = step * S // P, ((step + 1) * S - 1) // P
    order = torch.cat([torch.randperm(P, generator=generator(*key, "epoch", epoch))
                       for epoch in range(first, last + 1)])
    return order[step * S - first * P:][:S]


def batch_of_step(pairs: Pairs, chosen: torch.Tensor, T: int, dropout: float,
                  rng: torch.Generator) -> Batch:
    """The chosen pairs [S], and all that is random about them. The whole step is drawn at once and
    cut later, so that a draw does not depend on how it is divided. With dropout, both prompts of
    some pairs are empty: the preference is then trained for images without a prompt too."""
    S = len(chosen)
    noise = torch.randn(S, *pairs.winner.shape[1:], generator=rng)
    t = stratified_times(S, T, rng)
    dropped = torch.rand(S, generator=rng) < dropout
    return Batch(pairs.winner[chosen], pairs.loser[chosen], noise, t,
                 pairs.unsafe[chosen].replaced(dropped, pairs.empty),
                 pairs.safe[chosen].replaced(dropped, pairs.empty),
                 pairs.empty[torch.zeros_like(chosen)])


def micro_batches(batch: Batch, size: int, device: torch.device) -> Iterator[Batch]:
    """The parts of a step's batch that this process takes through the UNet, `size` pairs each."""
    for k in range(processes.RANK * size, len(batch.t), processes.WORLD * size):
        yield Batch(*(field[k:k + size].to(device) for field in batch))


def train(denoiser: Denoiser, parameters: list, pairs: Pairs, loss_function: Callable,
          resume_file: Path, recipe: dict[str, str], *key, precision: str, beta: float | str,
          lr: float, steps: int, batch_size: int, accumulate: int, caption_dropout: float,
          constant: bool = False) -> list[dict]:
    """Trains the parameters (of lora.inject()) on the pairs, in place. Returns the log, a row a
    step. Every SAVE_EVERY steps all is saved, and what was saved for the same recipe is continued;
    with beta "auto" the recipe is told the number. key: the seed and the expert's name, which every
    random draw starts from. Raises BadInput where numbers are not finite."""
    schedule, name = denoiser.schedule, recipe["concept"]
    parts = accumulate * processes.WORLD    # micro-batches in a step, of all processes
    # Mixed precision by hand. The LoRA, its gradients and the loss are fp32; the UNet computes in
    # half precision. fp16 needs the scaler, since small gradients would be zero there; for bf16
    # and fp32 it does nothing.
    dtype = PRECISIONS[precision]
    autocast = torch.autocast(denoiser.device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(denoiser.device.type, enabled=dtype == torch.float16)
    # Weight decay as in the released code; it is torch's default too.
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-2,
                                  fused=denoiser.device.type == "cuda")

    def policy(x_t, t, prompt):
        # Entered for each call, since autocast keeps the half-precision copies of weights that it
        # makes until it is left: copies made for the reference would carry no gradient.
        with autocast:
            return denoiser.predict(x_t, t, prompt).float()

    def reference(x_t, t, prompt):
        with torch.no_grad(), lora.switched_off(denoiser.unet):
            return policy(x_t, t, prompt)

    if beta == "auto":
        beta = auto_beta(reference, pairs, schedule, denoiser.device, name)
        recipe["beta_used"] = str(beta)
    log = load_state(resume_file, recipe, parameters, optimizer, scaler)
    processes.wait()    # until every process has read the file, since the first may delete it
    bar = tqdm(range(len(log), steps), initial=len(log), total=steps, leave=False,
               desc=f"{name:>16}", disable=processes.RANK > 0)
    for step in bar:
        warm_up = min(1, (step + 1) / (steps / 4 if constant else WARM_UP))
        decay = 1 if constant else 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_up * decay

        chosen = pairs_of_step(len(pairs.winner), batch_size * parts, step, *key)
        whole = batch_of_step(pairs, chosen, schedule.T, caption_dropout, generator(*key, step))
        means = 0    # of the loss and the metrics, over the step
        for batch in micro_batches(whole, batch_size, denoiser.device):
            loss, metrics = loss_function(policy, reference, batch, schedule, beta)
            scaler.scale(loss / parts).backward()    # gradients add up to those of the step's mean
            means = means + torch.stack([loss.detach(), *metrics.values()]) / parts
        processes.sum_over_all([means, *(parameter.grad for parameter in parameters)])

        scaler.unscale_(optimizer)
        # The norm as in the released code. Gradients are summed already: all processes clip alike.
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)    # fp16's leaves a step out whose gradients overflowed
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


def recipe_of(s: Settings, name: str, concepts: list[str]) -> dict[str, str]:
    """All that an expert depends on, for its file: where it is the same, the expert is."""
    recipe = {"concept": name, "steps": s.steps * len(concepts),
              "batch": s.batch * s.accumulate * processes.WORLD,
              "data_hash": sha256(*(s.data / c / "latents.safetensors" for c in concepts))}
    for key in ("loss", "beta", "lr", "schedule", "rank", "seed", "caption_dropout", "precision",
                "base_model_hash", "encoders_hash"):
        recipe[key] = getattr(s, key)
    return {key: str(value) for key, value in recipe.items()}


def train_expert(s: Settings, _, job: tuple[str, list[str], Path]) -> str:
    """job: (name, concepts, path). Trains one LoRA on the pairs of the concepts and writes it to
    the path. Returns a line that sums it up. A finished expert of the same recipe is left alone.
    The second argument is processes.spread()'s, which has nothing to give."""
    name, concepts, path = job
    pairs = read_latents(s.data, concepts, s.encoders_hash)
    recipe = recipe_of(s, name, concepts)
    resume_file = path.with_name(f".{path.stem}.resume")
    if path.is_file():
        made_by = LoRAFile(path).metadata
        changed = [key for key in recipe if made_by.get(key) != recipe[key]]
        if not changed:
            forget(resume_file)
            return f"{path}: already trained so on these pairs; delete it to train it again"
        processes.say(f"{path}: will be replaced, since this changed: {', '.join(changed)}")
    check_folder(path.parent)

    loss_function = named("--loss", s.loss, LOSSES)
    if isinstance(loss_function, type):    # a class, which sees all pairs first
        loss_function = loss_function(pairs)
    denoiser = load_denoiser(s.model, s.device, s.precision)
    # Every expert has a LoRA initialisation of its own.
    fresh = lora.init(denoiser.unet, s.rank, s.rank, generator(s.seed, name, "lora"))
    parameters = lora.inject(denoiser.unet, fresh)
    denoiser.unet.checkpointing = s.checkpointing
    if s.compile:
        denoiser.unet.compile()
    log = train(denoiser, parameters, pairs, loss_function, resume_file, recipe, s.seed, name,
                precision=s.precision, beta=s.beta, lr=s.lr, steps=int(recipe["steps"]),
                batch_size=s.batch, accumulate=s.accumulate, caption_dropout=s.caption_dropout,
                constant=s.schedule == "constant")
    if processes.RANK == 0:
        write_expert(path, denoiser, recipe, log)
        forget(resume_file)
    return f"{path}: {summary(log)}"


def main(args):
    device, precision = device_and_precision(args.device, args.precision)
    processes.start(device)
    unet = unet_files(args.model)
    s = Settings(**{**vars(args), "device": device, "precision": precision},
                 base_model_hash=sha256(*unet), encoders_hash=sha256(*encoder_files(args.model)))
    if Path(s.concept).name != s.concept:
        raise BadInput(f"--concept {s.concept!r}: is not the name of a folder in {s.data}; give "
                       "one, or all")
    concepts = [s.concept]
    if s.concept == "all":
        concepts = sorted(file.parent.name for file in s.data.glob("*/pairs.jsonl"))
    if not concepts:
        raise BadInput(f"{s.data}: no concept has pairs yet; run python make_data.py")
    named("--loss", s.loss, LOSSES)    # a wrong name fails before any process starts
    folder = s.out or Path("" if s.joint else "experts")
    jobs = [(concept, [concept], folder / f"{concept}.safetensors") for concept in concepts]
    if s.joint:
        jobs = [("joint", concepts, folder / "joint.safetensors")]
    workers = processes.processes_for(device, unet)
    processes.say(f"{folder}/.*.safetensors, .png: what is learned so far, every {SAVE_EVERY} "
                  "steps")
    for line in processes.spread(None, partial(train_expert, s), jobs, workers):
        processes.say(line)


if __name__ == "__main__":
    run(main, parse_arguments())
