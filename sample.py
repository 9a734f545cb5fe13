"""Step 4 of 4: draw, compare, judge. `python sample.py "a red ball in the park" --lora merged.safetensors`

What it is:  text to pictures with any number of LoRAs, base and aligned side by side, and the table that
             says whether the harm is gone (IP) and whether everything else is intact (fidelity).
Needs:       a Stable Diffusion (default: the embedded toy); prompts on the command line or in a file.
Gives:       samples/00000.png ... and index.jsonl; with --compare also base/, and with several --lora a folder for each;
             where there are several columns, compare.png; --judge: judge.json. base/ and the folders of several --lora hold
             pictures alone, so that pytorch-fid, Q16 and NudeNet read them as they are; samples/ itself has compare.png too.

IP, the inappropriate probability, is the share of pictures in which the judge sees ANY harm (model/report.py).

Seeds: picture i of all starts from seed + i, which is prompt i // N, image i % N with --images-per-prompt N; where the
prompts' file gives a prompt its own seed, its image k starts from seed + own + k. Base and aligned share their seeds.

The same command continues what was interrupted: a batch that is there whole, from the same model, LoRAs, prompts and
settings, is not drawn again (chunks/ has a record of each; a single batch has nothing to continue).
"""
from functools import partial
from pathlib import Path

from model.files import TOY, BadInput, Parser, run


def parse_arguments():
    parser = Parser("Draws pictures, with or without LoRAs; compares and judges them.")
    parser.add_argument("prompt", nargs="*", help="what to draw, one picture each")
    parser.add_argument("--prompts", type=Path, help="JSON lines or CSV with a column prompt, such as data/test.jsonl; CoProV2 and I2P as published, with I2P's own seeds and guidance (default: none)")
    parser.add_argument("--lora", nargs="+", action="append", default=[], metavar="FILE[@STRENGTH]", help="LoRA files, composed; strength 1 unless given; once more for another column to compare (default: none)")
    parser.add_argument("--compare", action="store_true", help="draw the base model too, same seeds, and a grid of both")
    parser.add_argument("--judge", nargs="?", const="toy", metavar="JUDGE", help="judge the pictures and print the table: toy, for the toy world, or q16:DIR, a CLIP ViT-L/14 folder with q16.safetensors in it (default: none; without a value: toy)")
    parser.add_argument("--clipscore", type=Path, metavar="DIR", help="print the CLIPScore of safe prompts, by this CLIP folder (default: none)")
    parser.add_argument("--show-unsafe", action="store_true", help="do not blur unsafe pictures on the grid (default: blurred, except the toy's)")
    parser.add_argument("--negative", default="", help="what guidance steers away from (default: nothing)")
    parser.add_argument("--steps", type=int, default=None, help="sampling steps (default: 10 for the toy, else 25)")
    parser.add_argument("--guidance", type=float, default=None, help="classifier-free guidance, 1 = none (default: the prompt's own in --prompts; without one 3 for the toy, else 7.5)")
    parser.add_argument("--sampler", choices=["dpm++", "ddim"], default="dpm++", help="(default: dpm++)")
    parser.add_argument("--size", type=int, default=None, help="side in pixels (default: the model's own)")
    parser.add_argument("--batch", type=int, default=None, help="pictures drawn at once (default: 16 up to 256 px, 4 at 512 px, 1 at 1024 px)")
    parser.add_argument("--images-per-prompt", type=int, default=1, help="pictures of each prompt (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder to write (default: samples)")
    return parser.parse_args()


ARGS = parse_arguments() if __name__ == "__main__" else None  # before the heavy imports: --help answers at once

import json  # noqa: E402
import math  # noqa: E402
from itertools import groupby  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

import lora  # noqa: E402
from model import toy_world as world  # noqa: E402
from model.checkpoint import model_files  # noqa: E402
from model.clip_judges import ClipScore  # noqa: E402
from model.files import prune, replacing, sha256, write_jsonl  # noqa: E402
from model.judge import ToyJudge, named_judge  # noqa: E402
from model.pictures import blurred, read_pictures, sheet  # noqa: E402
from model.prompts import Request, read_requests  # noqa: E402
from model.report import measure, short, table  # noqa: E402
from model.stable_diffusion import at_once, latent_side, load, pick_device, skeleton, unet_files, usual  # noqa: E402
from model.workers import Chunk, digest, processes_for, spread  # noqa: E402


def build(model: Path, device, adapter: dict | None):
    """What each worker process does once: load the model and put the LoRA in."""
    sd = load(model, device)
    if adapter:
        lora.inject(sd.unet, adapter)
    return sd


def draw(settings: dict, sd, jobs: list[tuple[str, int, float]]) -> np.ndarray:
    """The pictures of (prompt, seed, guidance) jobs, which have one guidance: uint8 [N, S, S, 3]."""
    prompts, seeds, guidance = zip(*jobs)
    try:
        return sd.draw(prompts, seeds, **{**settings, "guidance": guidance[0]})
    except torch.cuda.OutOfMemoryError:
        raise BadInput(f"no memory left for {len(jobs)} pictures at once; use a smaller --batch or --size") from None


def draw_all(args, device, column: dict, jobs: list[tuple[str, int, float]]):
    """Draws every (prompt, seed, guidance) of one column, but for the batches that are there, and writes index.jsonl."""
    settings = {"steps": args.steps, "guidance": None, "sampler": args.sampler, "negative": args.negative, "size": args.size}
    folder = column["folder"]
    ours = (folder / "index.jsonl").exists() or (folder / "chunks").is_dir()  # else the pictures that are there are somebody else's
    by_guidance = sorted(range(len(jobs)), key=lambda i: jobs[i][2])  # a batch has one guidance
    places = [group[i:i + args.batch] for _, same in groupby(by_guidance, key=lambda i: jobs[i][2]) for group in [list(same)]
              for i in range(0, len(group), args.batch)]
    several = len(places) > 1   # of one batch nothing can be left, and the weights of a large model need not be hashed
    identity = [sha256(*part) for part in (model_files(args.model), column["files"])] if several else []
    plan = partial(digest, identity, device.type, settings, column["names"])
    chunks = [Chunk(folder / f"chunks/{c:05d}.json", plan(place, [jobs[i] for i in place]), place, folder) for c, place in enumerate(places)]
    todo = [chunk for chunk in chunks if not (several and chunk.done())]
    results = spread(partial(build, args.model, device, column["adapter"]), partial(draw, settings),
                     [[jobs[i] for i in chunk.items] for chunk in todo], processes_for(device, unet_files(args.model))) if todo else ()
    left = sum(len(chunk.items) for chunk in todo)
    with tqdm(total=len(jobs), initial=len(jobs) - left, desc=column["label"], unit="picture") as bar:
        for chunk, drawn in zip(todo, results):
            for made in ("judge.json", "compare.png"):  # of pictures that are no longer all there
                (args.out / made).unlink(missing_ok=True)
            names = [f"{i:05d}.png" for i in chunk.items]
            for name, picture in zip(names, drawn):
                with replacing(folder / name) as temporary:
                    Image.fromarray(picture).save(temporary, "png")
            if several:
                chunk.write({"pictures": {name: sha256(folder / name) for name in names}})
            bar.update(len(drawn))
    prune(folder, "[0-9]" * 5 + ".png", {f"{i:05d}.png" for i in range(len(jobs))}) if ours else None
    prune(folder / "chunks", "*.json", {chunk.record.name for chunk in chunks if several})
    prune(folder, ".*.tmp", set())  # of a command that was killed
    write_jsonl(folder / "index.jsonl", [
        {"file": f"{i:05d}.png", "prompt": prompt, "seed": seed, **settings, "guidance": guidance, "lora": column["names"]}
        for i, (prompt, seed, guidance) in enumerate(jobs)])


def columns_of(args, network) -> list[dict]:
    """The models to draw with, in the order of the grid: label, folder, the LoRA's factors, files and names. One --lora, or
    none, draws into --out itself; several into a folder each."""
    columns = [{"label": "base", "folder": args.out / "base", "adapter": None, "files": [], "names": []}] if args.compare else []
    for group in args.lora or [[]]:
        adapter, names, files = lora.read(group, network)
        label = " + ".join(name.removesuffix("@1") for name in names) or "base"
        same = sum(column["label"].partition(" (")[0] == label for column in columns)
        label += f" ({same + 1})" * bool(same)    # two files of one name
        folder = args.out / label if len(args.lora) > 1 else args.out
        columns.append({"label": label, "folder": folder, "adapter": adapter, "files": files, "names": names})
    return columns


def report(args, judge, clip, columns: list[dict], jobs, requests: list[Request]) -> dict[str, list]:
    """Measures every column's pictures, prints the table, writes judge.json. Returns the verdicts."""
    folders = {column["label"]: column["folder"] for column in columns}
    verdicts, measured, left_out = measure(folders, requests, judge, clip, "base" if args.compare else None)
    seeds, scales = [seed for _, seed, _ in jobs], sorted({guidance for _, _, guidance in jobs})
    settings = {"judge": f"{judge.name} (unsafe: {judge.rule})" if judge else "none", "pictures": len(jobs),
                "images_per_prompt": args.images_per_prompt, "sampler": args.sampler, "steps": args.steps,
                "seeds": f"{min(seeds)}..{max(seeds)}" + ", the prompts' own" * any(r.seed is not None for r in requests),
                "guidance": f"{scales[0]:g}" + f"..{scales[-1]:g}, the prompts' own" * (len(scales) > 1)}
    outside = f", {left_out} with prompts outside the grammar left out" * isinstance(judge, ToyJudge)
    print("judge: {judge}; {pictures} pictures, {images_per_prompt} a prompt{}; seeds {seeds}; {sampler}, {steps} steps, guidance {guidance}; "
          "95% intervals, prompts resampled".format(outside, **settings))
    if clip:
        print(f"CLIPScore: mean of 100 cos(picture, prompt), CLIP {clip.name}")
    print("\n".join(table(measured)))
    with replacing(args.out / "judge.json") as temporary:
        temporary.write_text(json.dumps({
            **settings, "CLIPScore": clip and f"CLIP {clip.name}",
            "columns": {label: {key: [f.total, f.n] for key, f in figures.items()} for label, figures in measured.items()},
            "intervals": {label: {key: [f.low, f.high] for key, f in figures.items()} for label, figures in measured.items()}}, indent=1) + "\n")
    return verdicts


def grid(args, columns: list[dict], requests: list[Request], verdicts: dict[str, list]):
    """compare.png: up to 64 pictures, the columns of a prompt beside each other, with verdict and prompt under each. Blurred:
    what the judge calls unsafe or, without a judge, whatever a prompt of a harm category made; the toy's emblems harm no one."""
    toy, across = args.model.resolve() == TOY.resolve(), max(1, 8 // len(columns))     # prompts side by side
    number, cells = min(len(requests), 8 * across), []
    for i in (k * len(requests) // number for k in range(number)):
        for column in columns:
            (picture,), note, hide = read_pictures([column["folder"] / f"{i:05d}.png"]), [], bool(requests[i].categories)
            if verdicts:
                verdict = verdicts[column["label"]][i]
                hide, word, colour = (True, "UNSAFE", "red") if verdict.unsafe else (False, "safe", "green")
                note = [(f"{word} {verdict.harm:.2f}, {verdict.label}", colour)]
            cells.append((blurred(picture) if hide and not toy and not args.show_unsafe else picture, requests[i].prompt, *note))
    sheet(args.out / "compare.png", cells, len(columns) * min(number, across), tuple(short(c["label"]) for c in columns) * min(number, across))


def main(args):
    requests = [Request(prompt) for prompt in args.prompt] + (read_requests(args.prompts) if args.prompts else [])
    if not requests:
        raise BadInput(f"--prompts {args.prompts}: holds no prompt; give a file that does" if args.prompts else
                       "nothing to draw; give a prompt in quotes, or --prompts FILE")
    for flag in ("steps", "images_per_prompt", "size", "batch"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise BadInput(f"--{flag.replace('_', '-')} {getattr(args, flag)} is too small; use 1 or more")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise BadInput(f"--guidance {args.guidance} is not a finite number; use one such as 7.5")
    if args.compare and not args.lora:
        raise BadInput("--compare needs something to compare with the base model; give --lora FILE")
    device, network = pick_device(args.device), skeleton(args.model)
    latent = latent_side(network.config)                  # a latent's pixel stands for 8 x 8 pixels, in the toy for 4 x 4
    if args.judge == "toy" and (args.size or 4 * latent) != world.SIZE:
        raise BadInput((f"--size {args.size}" if args.size else f"--model {args.model}") + ": the toy judge reads pictures of "
                       f"{world.SIZE}x{world.SIZE} pixels, of the toy model; leave out --size, or use another --judge")
    judge = named_judge(args.judge, device) if args.judge else None
    clip = ClipScore(args.clipscore, device) if args.clipscore else None
    columns = columns_of(args, network)
    args.batch = args.batch or at_once(args.size or 8 * latent)
    steps, guidance = usual(args.model)
    args.steps = args.steps or steps

    n = args.images_per_prompt
    requests = [request for request in requests for _ in range(n)]                        # one for each picture
    jobs = [(r.prompt, args.seed + (i if r.seed is None else r.seed + i % n),
             next(g for g in (args.guidance, r.guidance, guidance) if g is not None)) for i, r in enumerate(requests)]
    for column in columns:
        draw_all(args, device, column, jobs)
    verdicts = report(args, judge, clip, columns, jobs, requests) if judge or clip else {}
    if len(columns) > 1:
        grid(args, columns, requests, verdicts)
    print(f"{args.out}: {len(jobs)} pictures" + ", compare.png" * (len(columns) > 1) + ", judge.json" * bool(judge or clip))


if __name__ == "__main__":
    run(main, ARGS)
