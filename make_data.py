"""Step 1 of 4: preference pairs. `python make_data.py` -> data/<concept>/

What it is:  for each harm category, unsafe prompts and minimally different safe ones, and both pictures,
             drawn by the very model that is to be aligned, from the same start noise. The safe picture is
             the winner (x_w) and the unsafe one the loser (x_l) of a pair.
Needs:       a Stable Diffusion (default: the embedded toy), its grammar of prompts and its judge.
Gives:       data/<concept>/pairs.jsonl, images/00000_{safe,unsafe}.png, sheet.png; and the prompts that the
             result is judged on, which share nothing with the pairs: data/test.jsonl for all concepts,
             data/<concept>/test.jsonl for one expert (its own unsafe prompts, and the safe ones).
"""
from functools import partial
from pathlib import Path

from model import toy_world as world
from model.files import BadInput, Parser, run


def parse_arguments():
    parser = Parser("Writes preference pairs: prompts, and pictures drawn by the model itself.")
    parser.add_argument("--concept", default="all", help=f"one of {', '.join(world.CATEGORIES)}, or all (default: all)")
    parser.add_argument("--pairs", type=int, default=160, help="pairs to draw for each concept (default: 160)")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write (default: data)")
    return parser.parse_args()


ARGS = parse_arguments() if __name__ == "__main__" else None  # before the heavy imports: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from model.files import TOY, prune, replacing, write_jsonl  # noqa: E402
from model.judge import ToyJudge  # noqa: E402
from model.pictures import sheet  # noqa: E402
from model.stable_diffusion import load, pick_device, unet_files  # noqa: E402
from model.workers import processes_for, spread  # noqa: E402

STEPS, GUIDANCE, BATCH = 10, 3.0, 16


def draw(sd, rows: list[dict]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (safe, unsafe) pictures of each row, both from the start noise of the row's seed."""
    seeds = [row["seed"] for row in rows]
    safe, unsafe = (sd.draw([row[key] for row in rows], seeds, STEPS, GUIDANCE) for key in ("safe", "unsafe"))
    return list(zip(safe, unsafe))


def write_concept(folder: Path, rows: list[dict], pictures: list, judge: ToyJudge) -> str:
    """Judges the pairs, writes those that are what they should be, and returns a line that counts them."""
    safe, unsafe = (np.stack(p) for p in zip(*pictures))
    verdicts = list(zip(judge.judge(safe), judge.judge(unsafe)))
    not_unsafe = [not v_unsafe.unsafe for _, v_unsafe in verdicts]
    not_safe = [v_safe.unsafe or None in (v_safe.object, v_safe.extra) for v_safe, _ in verdicts]
    kept = [i for i in range(len(rows)) if not (not_unsafe[i] or not_safe[i])]
    if not kept:
        raise BadInput(f"{folder}: the judge kept none of {len(rows)} pairs; does --model draw this concept at all?")
    written = []
    for i in kept:
        row = {"unsafe": rows[i]["unsafe"], "safe": rows[i]["safe"], "seed": rows[i]["seed"]}
        for kind, picture in (("safe", safe[i]), ("unsafe", unsafe[i])):
            row[f"{kind}_image"] = f"images/{i:05d}_{kind}.png"
            with replacing(folder / row[f"{kind}_image"]) as temporary:
                Image.fromarray(picture).save(temporary, "png")
        written.append(row)
    prune(folder / "images", "*_*safe.png", {Path(row[f"{kind}_image"]).name for row in written for kind in ("safe", "unsafe")})
    cells = [(p, text) for i in kept[:24] for p, text in ((unsafe[i], rows[i]["unsafe"]), (safe[i], rows[i]["safe"]))]
    sheet(folder / "sheet.png", cells, columns=8)
    write_jsonl(folder / "pairs.jsonl", written)  # last: its presence says that the pictures are complete
    return f"{folder}: {len(kept)} pairs; dropped {sum(not_unsafe)} not unsafe, {sum(not_safe)} not safe"


def main(args):
    if args.concept != "all" and args.concept not in world.CATEGORIES:
        raise BadInput(f"--concept {args.concept} is unknown; use all or one of {', '.join(world.CATEGORIES)}")
    if args.pairs < 1:
        raise BadInput(f"--pairs {args.pairs} leaves nothing to draw; use 1 or more")
    device = pick_device(args.device)
    judge, concepts = ToyJudge.load(TOY / "judge"), [args.concept] if args.concept != "all" else list(world.CATEGORIES)
    tests = world.test_prompts(24, args.seed)
    write_jsonl(args.out / "test.jsonl", tests)
    for concept in concepts:
        write_jsonl(args.out / concept / "test.jsonl", [row for row in tests if row["category"] in (concept, None)])

    # Each pair has a seed of its own, 100,000 apart from concept to concept.
    rows = {concept: [{"unsafe": unsafe, "safe": safe, "seed": (args.seed + list(world.CATEGORIES).index(concept) + 1) * 100_000 + i}
                      for i, (unsafe, safe) in enumerate(world.training_pairs(concept, args.pairs, args.seed))]
            for concept in concepts}
    chunks = [(concept, rows[concept][i:i + BATCH]) for concept in concepts for i in range(0, args.pairs, BATCH)]
    processes = processes_for(device, unet_files(args.model))
    results = spread(partial(load, args.model, device), draw, [chunk for _, chunk in chunks], processes)
    done: dict[str, list] = {concept: [] for concept in concepts}
    with tqdm(total=len(concepts) * args.pairs, desc="drawing pairs", unit="pair") as bar:
        for (concept, chunk), pictures in zip(chunks, results):
            done[concept] += pictures
            bar.update(len(chunk))
            if len(done[concept]) == args.pairs:
                bar.write(write_concept(args.out / concept, rows[concept], done.pop(concept), judge))


if __name__ == "__main__":
    run(main, ARGS)
