"""Step 2 of 4: one LoRA expert per harm category. `python train.py --concept hate` -> experts/hate.safetensors

What it is:  preference optimisation of a LoRA on the UNet's attention, on the pairs of make_data.py. The
             policy is the UNet with the LoRA, the reference the same UNet with the LoRA switched off.
Needs:       data/<concept>/, a Stable Diffusion (default: the embedded toy).
Gives:       experts/<concept>.safetensors and .jsonl (the log); --joint: joint.safetensors, the paper's
             baseline, one LoRA on all the data.

Letters: P pairs, B pairs in a step, C H W a latent's shape, L tokens, D context width.
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
    parser.add_argument("--loss", choices=["safety", "dpo"], default="safety", help="safety: DPO with guard, anchor and preservation; dpo: as published (default: safety)")
    parser.add_argument("--beta", type=float, default=100.0, help="strength of the preference, on the MEAN squared error (default: 100; published: 5000)")
    parser.add_argument("--steps", type=int, default=220, help="optimiser steps for each concept (default: 220)")
    parser.add_argument("--batch", type=int, default=8, help="pairs in a step (default: 8)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW, cosine to zero (default: 0.002; published for SD 1.5: 1e-5)")
    parser.add_argument("--rank", type=int, default=4, help="LoRA rank (default: 4)")
    return parser.parse_args()


ARGS = parse_arguments() if __name__ == "__main__" else None  # before the heavy imports: --help answers at once

import contextlib  # noqa: E402
import math  # noqa: E402
import zlib  # noqa: E402

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import dpo  # noqa: E402
import lora  # noqa: E402
from model.files import read_pairs, sha256, write_jsonl  # noqa: E402
from model.pictures import read_pictures  # noqa: E402
from model.stable_diffusion import load, pick_device, skeleton, unet_files  # noqa: E402
from model.workers import processes_for, slot, spread  # noqa: E402


def encode(sd, rows: list[dict], batch: int = 32) -> dict[str, torch.Tensor]:
    """Everything the UNet will need, computed once: winner and loser latents [P, C, H, W], and as sd.embed() gives
    them both prompts [P, L, D] and the empty one [1, L, D]. The training loop then runs the UNet and nothing else."""
    def latents(key):
        return torch.cat([sd.encode(read_pictures([row[key] for row in rows[i:i + batch]])) for i in range(0, len(rows), batch)])

    def contexts(prompts):
        return torch.cat([sd.embed(prompts[i:i + batch]) for i in range(0, len(prompts), batch)])
    return {"winner": latents("safe_image"), "loser": latents("unsafe_image"), "empty": contexts([""]),
            "safe": contexts([row["safe"] for row in rows]), "unsafe": contexts([row["unsafe"] for row in rows])}


def autocast(device: torch.device):
    """(context manager, gradient scaler): bf16 on CUDA, fp16 with a scaler where bf16 is missing, fp32 elsewhere."""
    if device.type != "cuda":
        return contextlib.nullcontext(), torch.amp.GradScaler(enabled=False)
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.autocast("cuda", dtype), torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)


def errors(sd, cache, index, t, noise, keep: bool):
    """Denoising errors [B] of the winners and losers of the pairs `index`, as the LoRA switch stands; and, if `keep`,
    the prediction [B, C, H, W] on a prompt that must go on drawing what it draws (else None).

    One batch of (winner | unsafe prompt), (loser | unsafe prompt) and, if keep, (winner | safe prompt). Within a
    pair timestep and noise are SHARED, so that only the content differs. In the first quarter of the step, whose
    pairs are random ones, the safe prompt is the EMPTY one: guidance subtracts what the model draws without a prompt
    from every picture, so that this must stay as well.
    """
    parts = 3 if keep else 2
    safe = cache["safe"][index]
    safe[:len(index) // 4] = cache["empty"]
    x0 = torch.cat([cache["winner"][index], cache["loser"][index], cache["winner"][index]][:parts])
    context = torch.cat([cache["unsafe"][index], cache["unsafe"][index], safe][:parts])
    noise, t = noise.repeat(parts, 1, 1, 1), t.repeat(parts)
    output = sd.predict(sd.schedule.add_noise(x0, noise, t), t, context).float()
    error = dpo.squared_error(output, sd.schedule.target(x0, noise, t)).chunk(parts)
    return error[0], error[1], output.chunk(parts)[2] if keep else None


def train(args, device, name: str, concepts: list[str], path: Path) -> str:
    """Trains one LoRA on the pairs of `concepts` and writes it to `path`. Returns a line that sums it up."""
    rows = [row for concept in concepts for row in read_pairs(args.data, concept)]
    sd = load(args.model, device)
    below, below_names = args.lora
    if below:
        lora.fuse(sd.unet, below)             # base and reference are now the user's model: frozen weights + LoRA
    cache = encode(sd, rows)
    seed = zlib.crc32(f"{args.seed} {name}".encode())  # every expert has its own LoRA initialisation
    parameters = lora.inject(sd.unet, lora.init(sd.unet, args.rank, args.rank, seed))
    optimiser = torch.optim.AdamW(parameters, args.lr, weight_decay=1e-2)
    cast, scaler = autocast(device)
    generator = torch.Generator().manual_seed(seed)
    steps, order, log = args.steps * len(concepts), torch.empty(0, dtype=torch.long), []
    keep = args.loss == "safety"

    bar = tqdm(range(steps), desc=f"{name:>16}", position=slot(), leave=False, mininterval=0.5)
    for step in bar:
        for group in optimiser.param_groups:  # ten steps of warm-up, then a cosine to zero
            group["lr"] = args.lr * min(1, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        while len(order) < args.batch:        # every pair once before any pair again
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        index, order = order[:args.batch].to(device), order[args.batch:]
        # Stratified timesteps, one from each of B equal slices: every step sees all noise levels.
        u = (torch.randperm(args.batch, generator=generator) + torch.rand(args.batch, generator=generator)) / args.batch
        t = (u * sd.schedule.T).long().to(device)
        noise = torch.randn(cache["winner"][index].shape, generator=generator).to(device)

        with torch.no_grad(), lora.switched_off(sd.unet), cast:
            winner_ref, loser_ref, kept_ref = errors(sd, cache, index, t, noise, keep)
        with cast:
            winner, loser, kept = errors(sd, cache, index, t, noise, keep)
        if keep:
            loss, metrics = dpo.safety_dpo(winner, loser, winner_ref, loser_ref, dpo.squared_error(kept, kept_ref), args.beta)
        else:
            loss, metrics = dpo.diffusion_dpo(winner, loser, winner_ref, loser_ref, args.beta)
        if not math.isfinite(loss.item()):
            sd.finite(winner_ref, "the reference's error")      # damaged weights are no matter of the settings
            raise BadInput(f"{name}: the loss is {loss.item()} at step {step}; lower --lr ({args.lr:g}) or --beta ({args.beta:g})")
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad(set_to_none=True)

        log.append({"step": step, "loss": loss.item(), **metrics})
        bar.set_postfix({"loss": f"{loss.item():.3f}", **{key: f"{metrics[key]:.3f}" for key in ("preference", "accuracy", "margin")},
                         **{key: f"{metrics[key] / metrics[key + '_ref']:.2f}" for key in ("winner", "loser")}}, refresh=False)
    if not all(p.isfinite().all() for p in parameters):
        raise BadInput(f"{name}: the last step left weights that are not finite; lower --lr ({args.lr:g}) or --beta ({args.beta:g})")

    lora.save(path, lora.extract(sd.unet), {
        "concept": name, "base_model_hash": sha256(*unet_files(args.model)), "data_hash": sha256(*(args.data / concept / "pairs.jsonl" for concept in concepts),
                                                                            *(row[key] for row in rows for key in ("safe_image", "unsafe_image"))),
        "prediction_type": sd.schedule.prediction_type, **({"on_top_of": ",".join(below_names)} if below else {}),
        "loss": args.loss, "beta": f"{args.beta:g}", "lr": f"{args.lr:g}", "steps": str(steps),
        "batch": str(args.batch), "rank": str(args.rank), "seed": str(args.seed)})
    write_jsonl(path.with_suffix(".jsonl"), log)
    last = log[-max(1, steps // 10):]
    mean = {key: sum(row[key] for row in last) / len(last) for key in last[0]}
    return (f"{path}: {len(rows)} pairs, {steps} steps; at the end loss {mean['loss']:.3f}, accuracy {mean['accuracy']:.2f}, "
            f"winner {mean['winner'] / mean['winner_ref']:.2f} and loser {mean['loser'] / mean['loser_ref']:.2f} times the "
            "reference's error")


def main(args):
    for flag in ("steps", "batch", "rank"):
        if getattr(args, flag) < 1:
            raise BadInput(f"--{flag} {getattr(args, flag)} is too small; use 1 or more")
    device = pick_device(args.device)
    found = sorted(p.parent.name for p in args.data.glob("*/pairs.jsonl"))
    if args.concept == "all" and not found:
        raise BadInput(f"{args.data}: no concept has pairs yet; run python make_data.py")
    concepts = found if args.concept == "all" else [args.concept]
    args.lora = lora.read(args.lora, skeleton(args.model))     # one LoRA (or None), and the names; once for all experts
    jobs = [(concept, [concept], (args.out or Path("experts")) / f"{concept}.safetensors") for concept in concepts]
    if args.joint:
        jobs = [("joint", concepts, (args.out or Path()) / "joint.safetensors")]
    for line in spread(None, partial(train_job, args, device), jobs, processes_for(device, unet_files(args.model))):
        tqdm.write(line)


def train_job(args, device, _, job) -> str:
    return train(args, device, *job)


if __name__ == "__main__":
    run(main, ARGS)
