"""Step 2 of 4: one LoRA expert per harm category. `python train.py --concept hate` -> experts/hate.safetensors

What it is:  preference optimisation of a LoRA on the UNet's attention, on the pairs of make_data.py. The
             policy is the UNet with the LoRA, the reference the same UNet with the LoRA switched off.
Needs:       data/<concept>/, a Stable Diffusion (default: the embedded toy).
Gives:       experts/<concept>.safetensors, .jsonl (the log) and .png (its curves); --joint: joint.safetensors, the
             paper's baseline, one LoRA on all the data.
Interrupted: the same command continues, from experts/.<concept>.resume, and the expert is the same to the bit (on a CPU).
Many GPUs:   torchrun --nproc_per_node=N train.py ...: a step then has N * --batch * --accumulate pairs.

Letters: P pairs, B pairs in a step, F views of a picture (1, or 2 with its mirror image), C H W a latent's shape, L tokens, D context width.
"""
from functools import partial
from pathlib import Path

from model.files import BadInput, Parser, run


def parse_arguments():
    parser = Parser("Trains one LoRA expert for each concept, by preference optimisation.")
    parser.add_argument("--concept", default="all", help="a folder under --data, or all of them, one expert each (default: all)")
    parser.add_argument("--joint", action="store_true", help="train one LoRA on all concepts instead, for as many steps as all experts together")
    parser.add_argument("--data", type=Path, default=Path("data"), help="what make_data.py wrote (default: data)")
    parser.add_argument("--lora", nargs="+", default=[], metavar="FILE[@STRENGTH]", help="LoRAs to train on top of: fused into the frozen model first, strength 1 unless given (default: none)")
    parser.add_argument("--out", type=Path, default=None, help="folder for the experts (default: experts; with --joint: the current folder)")
    parser.add_argument("--loss", choices=["safety", "dpo", "dpo+safe", "duo", "sdpo"], default="safety", help="safety: DPO with guard, anchor and preservation; dpo: as published; dpo+safe: on the safe prompt too; duo: and the prior on pure noise is kept; sdpo: the loser cannot raise the winner's error, to first order (default: safety)")
    parser.add_argument("--beta", type=float, default=100.0, help="strength of the preference, on the MEAN squared error (default: 100; published: 5000)")
    parser.add_argument("--steps", type=int, default=220, help="optimiser steps for each concept (default: 220)")
    parser.add_argument("--batch", type=int, default=8, help="pairs that one process takes through the UNet at once (default: 8)")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches in a step: N times the pairs in the memory of one batch (default: 1)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW, cosine to zero (default: 0.002; released for SD 1.5: 1e-5 times the 16 pairs of a step, 1.6e-4, constant)")
    parser.add_argument("--rank", type=int, default=4, help="LoRA rank (default: 4)")
    parser.add_argument("--augment", action="store_true", help="mirror each pair half of the time, and draw its latents from the VAE's posterior instead of taking the mean (default: off)")
    parser.add_argument("--caption-dropout", type=float, default=0.0, metavar="P", help="share of pairs, 0 to 1, whose prompt is the empty one in a step; works against --loss safety, which preserves the empty prompt (default: 0; released: 0.2)")
    parser.add_argument("--reuse", type=int, default=0, metavar="K", help="draw timestep and noise only K times for each pair, and compute the reference's errors once, before the first step; 0: anew in every step (default: 0)")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice instead of keeping them: less memory, a slower step (default: off)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: minutes at the start, for faster steps (default: off)")
    return parser.parse_args()


ARGS = parse_arguments() if __name__ == "__main__" else None  # before the heavy imports: --help answers at once

import contextlib  # noqa: E402
import math  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import zlib  # noqa: E402

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import dpo  # noqa: E402
import lora  # noqa: E402
from model import distributed  # noqa: E402
from model.cache import cached, data_hash, read_tensors, write_tensors  # noqa: E402
from model.files import check_folder, prune, read_pairs, sha256, stopping, write_jsonl  # noqa: E402
from model.pictures import curves  # noqa: E402
from model.stable_diffusion import load, pick_device, precision, skeleton, unet_files  # noqa: E402
from model.workers import processes_for, slot, spread  # noqa: E402

SAVE_EVERY = 120  # seconds between two saved states: what a power cut can cost


# --------------------------------------------------------------------------------------------------- one step
def autocast(device: torch.device):
    """(context manager, gradient scaler): bf16 on CUDA, fp16 with a scaler where bf16 is missing, fp32 elsewhere."""
    if device.type != "cuda":
        return contextlib.nullcontext(), torch.amp.GradScaler(enabled=False)
    dtype = precision(device)
    return torch.autocast("cuda", dtype), torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)


def draw_step(args, cache, T: int, index, generator) -> dict[str, torch.Tensor]:
    """All that is random in a step on the pairs `index` [B], drawn ONCE for each pair, so that winner and loser differ in
    their content alone. Whoever shares a step out (processes, accumulation) draws all of it, and then takes a slice."""
    B, shape = len(index), cache["winner"].shape[2:]
    # Stratified timesteps, one from each of B equal slices: every step sees all noise levels.
    u = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    step = {"index": index, "t": (u * T).long(), "noise": torch.randn(B, *shape, generator=generator),
            "empty": torch.arange(B) < B // 4 if B >= 4 else torch.rand(B, generator=generator) < 0.25, "flip": torch.zeros(B, dtype=torch.long)}
    if args.augment:
        step["flip"] = torch.randint(2, (B,), generator=generator)
        step["spread"] = torch.randn(B, *shape, generator=generator)
    if args.caption_dropout:
        step["dropped"] = torch.rand(B, generator=generator) < args.caption_dropout
    return step


def errors(sd, cache, step: dict[str, torch.Tensor], loss: str) -> tuple[torch.Tensor, ...]:
    """(L_w, L_l, more): denoising errors [B] of the winners and losers of a step as draw_step() gives it, as the LoRA switch
    stands, and what dpo.loss() wants besides for the loss of this name.

    One batch of (winner | unsafe prompt), (loser | unsafe prompt) and
        safety    (winner | safe prompt): an output [B, C, H, W] that must stay. For the pairs that step["empty"] marks, a
                  quarter of them, the prompt is EMPTY: guidance subtracts what the model draws without a
                  prompt from every picture, so that this must stay as well
        duo       (pure noise | empty prompt) at the last timestep, an output that must stay
        dpo+safe  (winner | safe prompt), (loser | safe prompt): two errors more
    """
    index, t, noise, flip = step["index"], step["t"], step["noise"], step["flip"]

    def latents(side):
        x0 = cache[side][index, flip]
        return x0 + cache[side + "_std"][index, flip] * step["spread"] if "spread" in step else x0
    winner, loser, unsafe, safe = latents("winner"), latents("loser"), cache["unsafe"][index], cache["safe"][index]
    if "dropped" in step:
        unsafe[step["dropped"]] = safe[step["dropped"]] = cache["empty"]
    if loss == "safety":
        safe[step["empty"]] = cache["empty"]
    x0 = [winner, loser] + {"safety": [winner], "dpo+safe": [winner, loser]}.get(loss, [])
    context, parts = [unsafe, unsafe, safe, safe][:len(x0)], len(x0)
    x0, noise, t = (x.to(sd.device) for x in (torch.cat(x0), noise.repeat(parts, 1, 1, 1), t.repeat(parts)))
    x_t, times = sd.schedule.add_noise(x0, noise, t), t
    if loss == "duo":
        B = len(index)
        context.append(cache["empty"].expand(B, -1, -1))
        x_t, times = torch.cat([x_t, noise[:B]]), torch.cat([t, torch.full_like(t[:B], sd.schedule.T - 1)])
    output = sd.predict(x_t, times, torch.cat(context).to(sd.device)).float()
    noised, target = output[:len(x0)], sd.schedule.target(x0, noise, t)
    error = dpo.squared_error(noised, target).chunk(parts)                                 # [B] of each part
    if loss in ("safety", "duo"):
        return *error[:2], output[-len(index):]                                            # the last part is what must stay
    if loss == "sdpo":
        return *error, dpo.winner_safe(*(noised - target).chunk(2))
    return error


@torch.no_grad()
def fixed_steps(args, sd, cache, generator, cast) -> dict[str, torch.Tensor]:
    """--reuse: K draws for each pair, and in "ref0", "ref1", ... the reference's errors() on them, which are constants:
    they are computed here once, and a step costs the policy's passes alone. Entry k * P + i is draw k of pair i."""
    P, table = len(cache["safe"]), []
    for _ in range(args.reuse):
        # Shuffled, so that a pair may get any slice of t; then back in the pairs' order, for entry k * P + i.
        step = draw_step(args, cache, sd.schedule.T, torch.randperm(P, generator=generator), generator)
        table.append({key: value[step["index"].argsort()] for key, value in step.items()})
    table = {key: torch.cat([step[key] for step in table]) for key in table[0]}
    with lora.switched_off(sd.unet), cast:
        parts = [errors(sd, cache, {key: v[i:i + args.batch] for key, v in table.items()}, args.loss) for i in range(0, args.reuse * P, args.batch)]
    return table | {f"ref{i}": torch.cat(part).cpu() for i, part in enumerate(zip(*parts))}


# ----------------------------------------------------------------------------------------------- one expert
def train(args, device, name: str, concepts: list[str], path: Path) -> str:
    """Trains one LoRA on the pairs of `concepts` and writes it to `path`, with its log and curves. Returns a line that
    sums it up. Continues where an interrupted run of the same plan was; a finished expert of the same plan is left alone."""
    pairs = sum(len(read_pairs(args.data, concept)) for concept in concepts)
    sd = load(args.model, device)
    below, names, files = args.lora
    on_top_of = ",".join(f"{name} ({sha256(file)[:8]})" for name, file in zip(names, files))
    steps, chunks = args.steps * len(concepts), args.accumulate * distributed.WORLD
    plan = {"concept": name, "base_model_hash": args.base_hash, "data_hash": data_hash(args.data, concepts),
            "prediction_type": sd.schedule.prediction_type, **({"on_top_of": on_top_of} if below else {}),
            "loss": args.loss, "beta": f"{args.beta:g}", "lr": f"{args.lr:g}", "steps": str(steps),
            "batch": str(args.batch * chunks), "rank": str(args.rank), "seed": str(args.seed),
            **{key: f"{getattr(args, key):g}" for key in ("augment", "caption_dropout", "reuse") if getattr(args, key)}}
    resume = path.with_name(f".{path.stem}.resume")
    if path.is_file() and {k: v for k, v in lora.load(path)[1].items() if not k.startswith(("ss_", "modelspec."))} == plan:
        resume.unlink(missing_ok=True)
        return f"{path}: already trained with these settings on these pairs; delete it to train it again"
    check_folder(path.parent)
    if below:
        lora.fuse(sd.unet, below)             # base and reference are now the user's model: frozen weights + LoRA
    cache = cached(sd, args.data, concepts, args.augment)
    sd.vae = sd.text = torch.nn.Module()      # from here on the UNet runs and nothing else: their memory is free again
    seed = zlib.crc32(f"{args.seed} {name}".encode())  # every expert has its own LoRA initialisation
    parameters = lora.inject(sd.unet, lora.init(sd.unet, args.rank, args.rank, seed))
    # Safe with a LoRA that is switched: it stands as in the forward pass when the backward pass computes a layer again.
    sd.unet.checkpointing = args.checkpointing
    if device.type == "cuda":
        sd.unet.to(memory_format=torch.channels_last)
    if args.compile:
        sd.unet.compile()
    optimiser = torch.optim.AdamW(parameters, args.lr, weight_decay=1e-2, fused=device.type == "cuda")
    cast, scaler = autocast(device)
    generator = torch.Generator().manual_seed(seed)
    table = fixed_steps(args, sd, cache, generator, cast) if args.reuse else None
    order, log = torch.empty(0, dtype=torch.long), []

    def save():
        state = {f"{i}.{key}": t for i, part in optimiser.state_dict()["state"].items() for key, t in part.items()}
        write_tensors(resume, {**state, **{f"parameter.{i}": p for i, p in enumerate(parameters)}, "order": order,
                               "generator": generator.get_state()}, plan=plan, log=log, scaler=scaler.state_dict())

    if found := read_tensors(resume, plan=plan):
        tensors, about = found
        log, order = about["log"], tensors.pop("order")
        generator.set_state(tensors.pop("generator"))
        scaler.load_state_dict(about["scaler"])
        with torch.no_grad():
            for i, p in enumerate(parameters):
                p.copy_(tensors.pop(f"parameter.{i}"))
        state = {i: {} for i in range(len(parameters))}
        for key, t in tensors.items():
            i, _, field = key.partition(".")
            state[int(i)][field] = t
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    distributed.wait()                                               # until every process has read it
    prune(path.parent, f".{path.stem}.*.tmp", set()) if distributed.RANK == 0 else None        # of a run that was killed

    bar = tqdm(range(len(log), steps), desc=f"{name:>16}", position=slot(), leave=False, mininterval=0.5, initial=len(log),
               total=steps, disable=distributed.RANK > 0)
    saved = time.monotonic()
    with stopping() as asked:
        for step in bar:
            for group in optimiser.param_groups:  # ten steps of warm-up, then a cosine to zero
                group["lr"] = args.lr * min(1, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            while len(order) < args.batch * chunks:        # every pair once before any pair again
                order = torch.cat([order, torch.randperm(pairs, generator=generator)])
            index, order = order[:args.batch * chunks], order[args.batch * chunks:]
            if table:
                entry = index + pairs * torch.randint(args.reuse, index.shape, generator=generator)
                whole = {key: value[entry] for key, value in table.items()}
            else:
                whole = draw_step(args, cache, sd.schedule.T, index, generator)

            values = {"stop": float(asked())}
            for chunk in range(distributed.RANK, chunks, distributed.WORLD):
                part = {key: value[chunk * args.batch:(chunk + 1) * args.batch] for key, value in whole.items()}
                if table:
                    reference = [part[f"ref{i}"].to(device) for i in range(sum(key.startswith("ref") for key in part))]
                else:
                    with torch.no_grad(), lora.switched_off(sd.unet), cast:
                        reference = errors(sd, cache, part, args.loss)
                with cast:
                    policy = errors(sd, cache, part, args.loss)
                loss, metrics = dpo.loss(args.loss, policy, reference, args.beta)
                scaler.scale(loss / chunks).backward()     # the sum over chunks is the mean over the step's pairs
                for key, value in {"loss": loss.item(), **metrics}.items():
                    values[key] = values.get(key, 0.0) + value / chunks
            total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
            distributed.add_up([total])
            distributed.add_up([p.grad for p in parameters])
            values = dict(zip(values, total.tolist()))
            stop = values.pop("stop")
            if not math.isfinite(values["loss"]):
                sd.finite(reference[0], "the reference's error")      # damaged weights are no matter of the settings
                raise BadInput(f"{name}: the loss is {values['loss']} at step {step}; lower --lr ({args.lr:g}) or --beta ({args.beta:g})")
            scaler.unscale_(optimiser)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)       # of the sum: every process clips alike
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad(set_to_none=True)

            log.append({"step": step, **values})
            bar.set_postfix({"loss": f"{values['loss']:.3f}", **{key: f"{values[key]:.3f}" for key in ("preference", "accuracy", "margin")},
                             **{key: f"{values[key] / values[key + '_ref']:.2f}" for key in ("winner", "loser")},
                             "images/s": f"{2 * len(index) * (bar.format_dict['rate'] or 0):.0f}"}, refresh=False)
            if stop or time.monotonic() - saved > SAVE_EVERY:
                if distributed.RANK == 0:
                    save()
                saved = time.monotonic()
            if stop:                          # every process knows it in the same step, whichever was asked
                bar.close()
                if distributed.RANK == 0:
                    print(f"note: {name}: stopped after step {step + 1} of {steps}; the same command continues", file=sys.stderr)
                raise SystemExit(130)
    if not all(p.isfinite().all() for p in parameters):
        raise BadInput(f"{name}: the last step left weights that are not finite; lower --lr ({args.lr:g}) or --beta ({args.beta:g})")

    last = log[-max(1, steps // 10):]
    mean = {key: sum(row[key] for row in last) / len(last) for key in last[0]}
    if distributed.RANK == 0:
        write_jsonl(path.with_suffix(".jsonl"), log)
        relative = {f"{side}'s error / reference's": [row[side] / row[side + "_ref"] for row in log] for side in ("winner", "loser")}
        curves(path.with_suffix(".png"), {"preference": [row["preference"] for row in log], **relative})
        lora.save(path, lora.extract(sd.unet), plan)                  # last: where an expert is, all is
        resume.unlink(missing_ok=True)
        if mean["winner"] > 1.05 * mean["winner_ref"]:
            print(f"note: {name}: the winner's error rose to {mean['winner'] / mean['winner_ref']:.2f} times the reference's, which spoils "
                  "pictures; --loss safety guards against it, and a lower --lr helps", file=sys.stderr)
    return (f"{path}: {pairs} pairs, {steps} steps; at the end loss {mean['loss']:.3f}, accuracy {mean['accuracy']:.2f}, "
            f"winner {mean['winner'] / mean['winner_ref']:.2f} and loser {mean['loser'] / mean['loser_ref']:.2f} times the "
            "reference's error")


def main(args):
    for flag in ("steps", "batch", "rank", "accumulate"):
        if getattr(args, flag) < 1:
            raise BadInput(f"--{flag} {getattr(args, flag)} is too small; use 1 or more")
    if not 0 <= args.lr < 1e38:
        raise BadInput(f"--lr {args.lr:g} is no learning rate; use a small number above 0")
    if args.reuse < 0:
        raise BadInput(f"--reuse {args.reuse} is negative; use 0 (off) or a few, such as 8")
    if not 0 <= args.caption_dropout <= 1:
        raise BadInput(f"--caption-dropout {args.caption_dropout:g} is not a share; use 0 to 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, also while the workers work and this process waits
    device = distributed.start(pick_device(distributed.local_device(args.device)))
    found = sorted(p.parent.name for p in args.data.glob("*/pairs.jsonl"))
    if args.concept == "all" and not found:
        raise BadInput(f"{args.data}: no concept has pairs yet; run python make_data.py")
    concepts = found if args.concept == "all" else [args.concept]
    args.lora = lora.read(args.lora, skeleton(args.model))     # one LoRA (or None), names, files; once for all experts
    args.base_hash = sha256(*unet_files(args.model))
    jobs = [(concept, [concept], (args.out or Path("experts")) / f"{concept}.safetensors") for concept in concepts]
    if args.joint:
        jobs = [("joint", concepts, (args.out or Path()) / "joint.safetensors")]
    processes = 1 if distributed.WORLD > 1 else processes_for(device, unet_files(args.model))
    for line in spread(None, partial(train_job, args, device), jobs, processes):
        if distributed.RANK == 0:
            tqdm.write(line)


def train_job(args, device, _, job) -> str:
    try:
        return train(args, device, *job)
    except torch.cuda.OutOfMemoryError:
        raise BadInput(f"{job[0]}: no memory left for {args.batch} pairs at once; use a smaller --batch (and --accumulate), or --checkpointing") from None


if __name__ == "__main__":
    run(main, ARGS)
