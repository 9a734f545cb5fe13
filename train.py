"""Step 2 of 4: one LoRA expert per harm category. `python train.py --concept hate`

What it is:  preference optimisation of a LoRA on the UNet's attention, on the pairs of
             make_data.py. The policy is the UNet with the LoRA, the reference the same UNet with
             the LoRA switched off. train() is the lesson; the rest saves, continues and reports.
Needs:       data/<concept>/latents.safetensors; the UNet of a Stable Diffusion (default: toy).
Gives:       experts/<concept>.safetensors, .jsonl (the log) and .png (its curves); with --joint
             joint.safetensors, the paper's baseline, one LoRA on all the data.
Interrupted: the same command continues at the last saved step, and gives the same expert, on a CPU
             to the bit: all that is random comes from generator(seed, name, step).
Many GPUs:   torchrun --nproc_per_node=N train.py ...; a step has N * --batch * --accumulate pairs.

Letters: P pairs in all, B of a batch, C H W a latent's shape, T timesteps.
"""
import math
import pkgutil
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
from model.tools.command import BadInput, Parser, positive, rate, run, share
from model.tools.device import PRECISIONS, device_and_precision
from model.tools.files import check_folder, sha256
from model.tools.training import generator, load_state, save_state, summary, write_log

WARM_UP = 10       # steps in which the rate rises [ours; published: 500 of 2,000]
SAVE_EVERY = 50    # steps: what a power cut can cost
SHOWN = "loss", "accuracy", "winner", "winner_ref"    # beside the progress bar


class Settings(NamedTuple):
    """What the command line says, resolved: the flags that a LoRA depends on, and hashes."""
    model: Path
    data: Path
    device: torch.device
    precision: str
    loss: str
    beta: float
    steps: int
    batch: int
    accumulate: int
    lr: float
    rank: int
    caption_dropout: float
    seed: int
    checkpointing: bool
    compile: bool
    base_model_hash: str
    encoders_hash: str


def parse_arguments(argv=None):
    parser = Parser("Trains one LoRA expert for each concept, by preference optimisation.")
    add = parser.add_argument
    add("--concept", default="all", help="a folder of --data, or all, one expert each")
    add("--joint", action="store_true", help="train one LoRA on all concepts instead, for as many "
        "steps as all experts together")
    add("--data", type=Path, default=Path("data"), help="what make_data.py wrote")
    add("--out", type=Path,
        help="folder to write (default: experts; with --joint the current folder)")
    add("--loss", default="safety", help="safety: DPO, and safe prompts keep what they gave; dpo: "
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
    add("--checkpointing", action="store_true", help="compute activations twice instead of keeping "
        "them: less memory, a slower step")
    add("--compile", action="store_true", help="torch.compile the UNet: a slow start, fast steps")
    return parser.parse_args(argv)


def loss_named(name: str) -> Callable:
    """A loss of dpo.py by its name, or any other by its dotted name. Raises BadInput."""
    try:
        loss = LOSSES[name] if name in LOSSES else pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        loss = None
    if not callable(loss):
        raise BadInput(f"--loss {name}: there is no such loss; use {' or '.join(LOSSES)}, or the "
                       "dotted name of a function such as model.rivals.losses.duo")
    return loss


def pairs_of_step(P: int, B: int, step: int, *seed) -> torch.Tensor:
    """The pairs [B] of a step. Epochs, each a permutation of all P pairs, are laid end to end and
    cut into steps: every pair comes once before any comes again."""
    first, last = step * B // P, ((step + 1) * B - 1) // P
    order = torch.cat([torch.randperm(P, generator=generator(*seed, "epoch", epoch))
                       for epoch in range(first, last + 1)])
    return order[step * B - first * P:][:B]


def batch_of_step(pairs: Pairs, chosen: torch.Tensor, T: int, dropout: float,
                  rng: torch.Generator) -> Batch:
    """The chosen pairs [B] and all that is random about them. Processes and --accumulate share a
    step out: it is drawn whole, and then cut.

    Why some safe prompts are empty: guidance subtracts what the UNet predicts without a prompt from
    every image, so that this must stay as it was too. With dropout some pairs have no prompt."""
    B = len(chosen)
    quarter = int(B / 4 + torch.rand((), generator=rng))    # of a single pair: 1 in 4 steps
    t = stratified_times(B, T, rng)
    noise = torch.randn(B, *pairs.winner.shape[1:], generator=rng)
    use_empty = torch.randperm(B, generator=rng) < quarter
    dropped = torch.rand(B, generator=rng) < dropout
    unsafe, safe = (prompt.map(lambda states: states[chosen])
                    for prompt in (pairs.unsafe, pairs.safe))
    return Batch(pairs.winner[chosen], pairs.loser[chosen], noise, t,
                 unsafe.replaced(dropped, pairs.empty),
                 safe.replaced(dropped | use_empty, pairs.empty),
                 pairs.empty.map(lambda states: states.expand(B, *states.shape[1:])))


def micro_batches(batch: Batch, size: int, device: torch.device) -> Iterator[Batch]:
    """This process's parts of a step's batch, `size` pairs each."""
    for k in range(processes.RANK * size, len(batch.t), processes.WORLD * size):
        cut = lambda tensor: tensor[k:k + size].to(device)
        yield Batch(*(field.map(cut) if hasattr(field, "map") else cut(field) for field in batch))


def train(denoiser: Denoiser, parameters: list, pairs: Pairs, loss_function: Callable, state: Path,
          recipe: dict[str, str], *seed, precision: str, beta: float, lr: float, steps: int,
          batch: int, accumulate: int, caption_dropout: float) -> list[dict]:
    """Trains the parameters (of lora.inject()) on the pairs, in place. Returns the log, a row a
    step. Every SAVE_EVERY steps the state is saved, and a state of the same recipe is continued.
    Raises BadInput where the loss is not finite."""
    schedule, number = denoiser.schedule, accumulate * processes.WORLD    # of batches in a step
    # Mixed precision by hand. The LoRA, its gradients and the loss are fp32; the UNet computes in
    # half precision. fp16 needs the scaler, since small gradients would be zero there; for bf16
    # and fp32 it does nothing.
    dtype = PRECISIONS[precision]
    autocast = torch.autocast(denoiser.device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(denoiser.device.type, enabled=dtype == torch.float16)
    # 1e-2: as in the released code, and torch's default.
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-2,
                                  fused=denoiser.device.type == "cuda")

    def policy(x_t, t, prompt):
        with autocast:
            return denoiser.predict(x_t, t, prompt).float()

    def reference(x_t, t, prompt):
        with torch.no_grad(), lora.switched_off(denoiser.unet):
            return policy(x_t, t, prompt)

    log = load_state(state, recipe, parameters, optimizer, scaler)
    processes.wait()    # until every process has read it
    bar = tqdm(range(len(log), steps), initial=len(log), total=steps, leave=False,
               desc=f"{recipe['concept']:>16}", disable=processes.RANK > 0)
    for step in bar:
        warm_up, cosine = min(1, (step + 1) / WARM_UP), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_up * cosine

        chosen = pairs_of_step(len(pairs.winner), batch * number, step, *seed)
        rng = generator(*seed, step)
        whole = batch_of_step(pairs, chosen, schedule.T, caption_dropout, rng)
        sums = 0
        for part in micro_batches(whole, batch, denoiser.device):
            loss, metrics = loss_function(policy, reference, part, schedule, beta)
            scaler.scale(loss / number).backward()    # gradients add up to those of the step's mean
            sums = sums + torch.stack([loss.detach(), *metrics.values()]) / number
        processes.sum_over_all([sums, *(parameter.grad for parameter in parameters)])
        denoiser.finite(sums, f"{recipe['concept']}: the loss at step {step}",
                        f"use a lower --lr ({lr:g}) or --beta ({beta:g})")

        scaler.unscale_(optimizer)
        # 1.0: as in the released code. Of the sum over processes, so that all clip alike.
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        log.append({"step": step, **dict(zip(("loss", *metrics), sums.tolist()))})
        bar.set_postfix({key: f"{log[-1][key]:.3f}" for key in SHOWN}, refresh=False)
        if (step + 1) % SAVE_EVERY == 0 and processes.RANK == 0:
            save_state(state, recipe, log, parameters, optimizer, scaler)
    return log


def train_expert(settings: Settings, _, job: tuple[str, list[str], Path]) -> str:
    """job: (name, concepts, path). Trains one LoRA on the pairs of the concepts and writes it to
    the path. Returns a line that sums it up. A finished expert of the same recipe is left alone."""
    name, concepts, path = job
    s, steps = settings, settings.steps * len(concepts)
    pairs = read_latents(s.data, concepts, s.encoders_hash)
    recipe = {"concept": name, "steps": steps, "batch": s.batch * s.accumulate * processes.WORLD,
              "data_hash": sha256(*(s.data / c / "latents.safetensors" for c in concepts))}
    recipe |= {key: getattr(s, key) for key in (
        "loss", "beta", "lr", "rank", "seed", "caption_dropout", "precision", "base_model_hash",
        "encoders_hash")}
    recipe = {key: str(value) for key, value in recipe.items()}
    state = path.with_name(f".{path.stem}.resume")
    if path.is_file() and recipe.items() <= LoRAFile(path).metadata.items():
        state.unlink(missing_ok=True)
        return f"{path}: already trained so on these pairs; delete it to train it again"
    check_folder(path.parent)

    loss_function = loss_named(s.loss)
    if isinstance(loss_function, type):    # one that has to see all pairs first
        loss_function = loss_function(pairs)
    denoiser = load_denoiser(s.model, s.device, s.precision)
    # Every expert has a LoRA initialisation of its own.
    fresh = lora.init(denoiser.unet, s.rank, s.rank, generator(s.seed, name, "lora"))
    parameters = lora.inject(denoiser.unet, fresh)
    denoiser.unet.checkpointing = s.checkpointing
    if s.compile:
        denoiser.unet.compile()
    log = train(denoiser, parameters, pairs, loss_function, state, recipe, s.seed, name,
                precision=s.precision, beta=s.beta, lr=s.lr, steps=steps, batch=s.batch,
                accumulate=s.accumulate, caption_dropout=s.caption_dropout)
    if processes.RANK == 0:
        write_log(path, log)
        prediction = denoiser.schedule.prediction_type
        save(path, lora.extract(denoiser.unet), {**recipe, "prediction_type": prediction})
        state.unlink(missing_ok=True)
    return f"{path}: {summary(log)}"


def main(args):
    device, precision = device_and_precision(args.device, args.precision)
    processes.start(device)
    found = sorted(file.parent.name for file in args.data.glob("*/pairs.jsonl"))
    if args.concept == "all" and not found:
        raise BadInput(f"{args.data}: no concept has pairs yet; run python make_data.py")
    concepts = found if args.concept == "all" else [args.concept]
    values = {**vars(args), "device": device, "precision": precision,
              "base_model_hash": sha256(*unet_files(args.model)),
              "encoders_hash": sha256(*encoder_files(args.model))}
    settings = Settings(*(values[name] for name in Settings._fields))
    loss_named(settings.loss)    # now, and not in each process
    folder = args.out or Path("" if args.joint else "experts")
    jobs = [(concept, [concept], folder / f"{concept}.safetensors") for concept in concepts]
    if args.joint:
        jobs = [("joint", concepts, folder / "joint.safetensors")]
    number = processes.processes_for(device, unet_files(args.model))
    for line in processes.spread(None, partial(train_expert, settings), jobs, number):
        if processes.RANK == 0:
            tqdm.write(line)


if __name__ == "__main__":
    run(main, parse_arguments())
