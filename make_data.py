"""Step 1 of 4: preference pairs. `python make_data.py` -> data/<concept>/

What it is:  for each harm category, unsafe prompts and minimally different safe ones, and both pictures,
             drawn by the very model that is to be aligned, from the same start noise. The safe picture is
             the winner (x_w) and the unsafe one the loser (x_l) of a pair.
Needs:       a Stable Diffusion (default: the embedded toy); prompts: from its grammar, from files (--prompts), or
             from a language model (--llm). Pictures that exist already (--images) are read and not drawn.
Gives:       data/<concept>/pairs.jsonl, images/00000_{safe,unsafe}.png, sheet.png; and the prompts that the
             result is judged on, which share no prompt with the pairs: data/test.jsonl for all concepts,
             data/<concept>/test.jsonl for one expert (its own unsafe prompts, and the safe ones).

Pairs are made in chunks of --batch, and a chunk is made whole or not at all, since a picture's last bits depend on what
else is in its batch. data/<concept>/chunks/ has a record of each: which pictures it made, by their hashes, and from what.
What has its record is not made again, so that interrupted work continues, and processes share the chunks: under
`torchrun --nproc_per_node=N make_data.py ...` each makes every Nth, and the first gathers the results.
"""
from functools import partial
from pathlib import Path

from model import toy_world as world
from model.files import BadInput, Parser, run


def parse_arguments():
    parser = Parser("Writes preference pairs: prompts, and pictures drawn by the model itself.")
    parser.add_argument("--concept", default="all", help=f"one category: {', '.join(world.CATEGORIES)}, or one of your prompts'; or all (default: all)")
    parser.add_argument("--pairs", type=int, default=None, help="pairs for each concept (default: 160; of --prompts: all), or for each entry of --concepts (default: 32)")
    parser.add_argument("--prompts", type=Path, nargs="+", metavar="FILE", help="pairs and test prompts from CSV or JSON lines: CoProV2, the Hugging Face form, or your own (default: the toy's grammar)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="read the pictures that --prompts names from this folder instead of drawing them")
    parser.add_argument("--llm", type=Path, metavar="DIR", help="let this causal language model (transformers folder) write the prompts; needs --concepts")
    parser.add_argument("--concepts", type=Path, metavar="FILE", help="what --llm writes about: JSON, {\"category\": [\"concept\", ...], ...}")
    parser.add_argument("--steps", type=int, default=None, help="sampling steps (default: 10 for the toy, else 25)")
    parser.add_argument("--guidance", type=float, default=None, help="classifier-free guidance, 1 = none (default: 3 for the toy, else 7.5)")
    parser.add_argument("--negative", default="", help="what guidance steers away from, in both pictures (default: nothing)")
    parser.add_argument("--size", type=int, default=None, help="side in pixels (default: the model's own); with --images: crop and resize to it (default: as they are)")
    parser.add_argument("--batch", type=int, default=None, help="pairs in a chunk, drawn at once (default: 16 up to 256 px, 4 at 512 px, 1 at 1024 px)")
    parser.add_argument("--judge", choices=["toy", "none"], default=None, help="drops pairs whose pictures are not what they should be (default: toy for pictures drawn by the toy, else none)")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write (default: data)")
    return parser.parse_args()


ARGS = parse_arguments() if __name__ == "__main__" else None  # before the heavy imports: --help answers at once

import hashlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import sys  # noqa: E402
import zlib  # noqa: E402
from collections import Counter  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from tqdm import tqdm  # noqa: E402

from model.checkpoint import model_files  # noqa: E402
from model.distributed import local_device, share  # noqa: E402
from model.files import TOY, prune, read_jsonl, replacing, sha256, write_jsonl  # noqa: E402
from model.judge import pair_judge  # noqa: E402
from model.llm import LanguageModel, read_concepts, write_pairs  # noqa: E402
from model.pictures import sheet  # noqa: E402
from model.prompts import Pair, Prompts, read_prompts, split  # noqa: E402
from model.stable_diffusion import at_once, latent_side, load, pick_device, skeleton, unet_files, usual  # noqa: E402
from model.workers import Chunk, cores, digest, processes_for, spread  # noqa: E402

KINDS = ("safe", "unsafe")


def firsts(rows: list[dict], key) -> list[dict]:
    """The rows without those whose key(row) an earlier one has."""
    seen: dict = {}
    for row in rows:
        seen.setdefault(key(row), row)
    return list(seen.values())


# ------------------------------------------------------------------------------------------- the prompts
def from_grammar(args):
    """({concept: rows to draw}, test rows) of the toy world. Each pair has a seed of its own, 100,000 apart from concept to concept."""
    count, names = 160 if args.pairs is None else args.pairs, list(world.CATEGORIES)
    if args.concept not in ("all", *names):
        raise BadInput(f"--concept {args.concept} is unknown; use all or one of {', '.join(names)}")
    rows = {concept: [{"unsafe": unsafe, "safe": safe, "seed": (args.seed + names.index(concept) + 1) * 100_000 + i}
                      for i, (unsafe, safe) in enumerate(world.training_pairs(concept, count, args.seed))]
            for concept in (names if args.concept == "all" else [args.concept])}
    return rows, world.test_prompts(24, args.seed)


def from_files(args, files: dict[Path, Prompts], say):
    """({concept: rows}, test rows) of what was read. A row's seed comes from the row alone, so that it is the same in
    every category of its pair, and whatever else is in the file. Rows of --images have "sources" instead of a seed."""
    pairs, tests, test_rows = [], {}, Counter()
    for file, found in files.items():
        say("\n  ".join([f"{file}:", *found.report()]))
        pairs += found.pairs
        for prompt, categories in found.tests.items():
            tests.setdefault(prompt, set()).update(categories)
        test_rows += found.test_rows
    given = set(tests)
    train, tests = split(pairs, tests, args.seed)
    if not pairs:  # test prompts alone: compared with the pairs that are there already
        seen = {row.get(key) for file in args.out.glob("*/pairs.jsonl") for row in read_jsonl(file) for key in KINDS}
        tests = {prompt: categories for prompt, categories in tests.items() if prompt not in seen}
    repeats = sum(test_rows[prompt] for prompt in given - set(tests))
    say(f"test: {len(tests):,} prompts" + (f"; {repeats:,} rows left out, which repeat a training prompt" if given
                                           else f", held out with {len(pairs) - len(train):,} pairs"
                                           + ", since a tenth of fewer than 10 prompts is none" * (len(train) == len(pairs))))
    rows: dict[str, list] = {}
    for pair in train:
        row = {"unsafe": pair.unsafe, "safe": pair.safe}
        row |= {"sources": pair.images} if args.images else {"seed": zlib.crc32(f"{args.seed} {pair.key}".encode())}
        for concept in pair.categories:
            rows.setdefault(concept, []).append(row)
    if args.concept != "all" and rows and args.concept not in rows:
        raise BadInput(f"--concept {args.concept}: no pair has it; use all or one of {', '.join(sorted(rows))}")
    rows = {concept: rows[concept][:None if args.llm else args.pairs] for concept in sorted(rows) if args.concept in ("all", concept)}
    return rows, [{"prompt": prompt, "category": category} for prompt, categories in tests.items() for category in sorted(categories) or [None]]


def from_language_model(args, device, rank: int, world_size: int, say) -> Prompts:
    """The pairs that the language model writes, also as out/prompts.jsonl, for --prompts another time. Resumable and
    shared as the pictures are: an entry of the concept list is a chunk, which depends on the seed and the entry alone."""
    entries, count = read_concepts(args.concepts), 32 if args.pairs is None else args.pairs
    identity = sha256(*sorted(f for f in args.llm.glob("*") if f.suffix in (".json", ".safetensors")))
    folder = args.out / "_written"  # no category's folder has an underscore
    everything = [Chunk(folder / f"{i:05d}.json", digest(identity, args.seed, count, entry), entry) for i, entry in enumerate(entries)]
    chunks = [chunk for chunk in everything if args.concept in ("all", chunk.items[0])]
    if not chunks:
        raise BadInput(f"--concept {args.concept}: {args.concepts} does not list it; use all or one of {', '.join(sorted(dict(entries)))}")
    todo = [chunk for chunk in chunks[rank::world_size] if not chunk.done()]
    ask = LanguageModel(args.llm, device) if todo else None
    for chunk in tqdm(todo, desc="writing prompts", unit="concept", disable=rank > 0):
        rows, counts = write_pairs(ask, *chunk.items, count, zlib.crc32(f"{args.seed} {chunk.items}".encode()))
        chunk.write({"rows": rows, "counts": counts})
    written = [chunk.wait(world_size == 1) for chunk in chunks]
    answers = [row for record in written for row in record["rows"]]
    rows = firsts(answers, lambda row: row["unsafe"].casefold())
    counts = sum((Counter(record["counts"]) for record in written), Counter({"duplicates": len(answers) - len(rows)}))
    summary = f"{len(rows):,} of {count * len(chunks):,} pairs written; " + ", ".join(f"{n:,} {what}" for what, n in sorted(counts.items()))
    if not rows:
        raise BadInput(f"--llm {args.llm}: {summary}; use a model that follows instructions")
    say(f"{args.llm}: {summary}")
    if rank == 0:
        for pattern in ("*.json", ".*.tmp"):
            prune(folder, pattern, {chunk.record.name for chunk in everything})
        write_jsonl(args.out / "prompts.jsonl", rows)
    return Prompts([Pair(json.dumps([row["unsafe"], row["safe"]]), row["unsafe"], row["safe"], None, {row["category"]}) for row in rows])


# ------------------------------------------------------------------------------------------ the pictures
def build(model: Path | None, device, judge: str):
    """What each worker process does once: load the model, unless pictures are read, and the judge."""
    return model and load(model, device), pair_judge(judge)


def draw(sd, rows: list[dict], settings: dict) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (safe, unsafe) pictures of each row, both from the start noise of the row's seed."""
    seeds = [row["seed"] for row in rows]
    try:
        safe, unsafe = (sd.draw([row[key] for row in rows], seeds, **settings) for key in KINDS)
    except torch.cuda.OutOfMemoryError:
        raise BadInput(f"no memory left for {len(rows)} pairs at once; use a smaller --batch or --size") from None
    return list(zip(safe, unsafe))


def read(path: Path, size: int | None) -> np.ndarray | None:
    """uint8 [H, W, 3], cropped in the middle to a square of `size` if that is given; None where it is no picture."""
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:  # no format that would start another program
            image = image.convert("RGB")
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS) if size else image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def make(settings: dict, state, rows: list[dict]) -> dict:
    """The pictures of a chunk, judged: {"dropped": {row: reasons}, "pictures": {file name: PNG}}. It writes nothing: a
    worker may outlive a killed command, and must not write into what the next one makes."""
    sd, judge = state
    pictures = draw(sd, rows, settings) if sd else [tuple(read(path, settings["size"]) for path in row["sources"]) for row in rows]
    dropped = {row["name"]: ["not readable"] for row, pair in zip(rows, pictures) if pair[0] is None or pair[1] is None}
    whole = [(row["name"], pair) for row, pair in zip(rows, pictures) if row["name"] not in dropped]
    if whole:
        faults = judge.reject(*zip(*(pair for _, pair in whole)))
        dropped |= {name: reasons for (name, _), reasons in zip(whole, faults) if reasons}
    files = {}
    for name, pair in whole:
        for kind, picture in zip(KINDS, pair if name not in dropped else ()):
            Image.fromarray(picture).save(buffer := io.BytesIO(), "png")
            files[f"{name}_{kind}.png"] = buffer.getvalue()
    return {"dropped": dropped, "pictures": files}


def store(folder: Path, chunk: Chunk, made: dict):
    """Writes a chunk's pictures and then its record. pairs.jsonl goes first: its presence says that all is complete."""
    (folder / "pairs.jsonl").unlink(missing_ok=True)
    for name, data in made["pictures"].items():
        with replacing(folder / "images" / name) as temporary:
            temporary.write_bytes(data)
    chunk.write({"dropped": made["dropped"], "pictures": {name: hashlib.sha256(data).hexdigest() for name, data in made["pictures"].items()}})


def gather(folder: Path, chunks: list[Chunk], judge: str, alone: bool) -> str:
    """Waits for all chunks, writes pairs.jsonl and sheet.png, removes what an earlier run left, and returns a line that
    counts the pairs."""
    records = [chunk.wait(alone) for chunk in chunks]
    faults, written = Counter({fault: 0 for fault in pair_judge(judge).faults}), []
    for chunk, record in zip(chunks, records):
        faults.update(reason for reasons in record["dropped"].values() for reason in reasons)
        for row in chunk.items:
            if row["name"] not in record["dropped"]:
                written.append({**{key: row[key] for key in ("unsafe", "safe", "seed") if key in row},
                                **{f"{kind}_image": f"images/{row['name']}_{kind}.png" for kind in KINDS}})
    if not written:
        raise BadInput(f"{folder}: none of {sum(len(c.items) for c in chunks)} pairs was kept ({', '.join(f'{n} {why}' for why, n in faults.items())}); "
                       "use pictures, or a --model, that show this concept")
    cells = [(np.asarray(Image.open(folder / row[f"{kind}_image"])), row[kind]) for row in written[:24] for kind in KINDS[::-1]]
    sheet(folder / "sheet.png", cells, columns=8)
    write_jsonl(folder / "pairs.jsonl", written)  # now that the pictures are complete; and only then goes what it does not list
    prune(folder / "images", "*_*safe.png", {name for record in records for name in record["pictures"]})
    prune(folder / "chunks", "*.json", {chunk.record.name for chunk in chunks})
    for leftovers in (folder, folder / "images", folder / "chunks"):
        prune(leftovers, ".*.tmp", set())  # of a command that was killed
    return f"{folder}: {len(written)} pairs" + ("; dropped " + ", ".join(f"{n} {why}" for why, n in faults.items()) if faults else "")


def make_pictures(args, device, rows: dict[str, list[dict]], rank: int, world_size: int):
    toy = args.model.resolve() == TOY.resolve()
    judge = args.judge or ("toy" if toy and not args.images else "none")
    batch = args.batch or (16 if args.images else at_once(args.size or 8 * latent_side(skeleton(args.model).config)))
    settings, processes, identity = {"size": args.size}, cores(), None
    if not args.images:
        steps, guidance = usual(args.model)
        settings |= {"steps": args.steps or steps, "negative": args.negative, "guidance": guidance if args.guidance is None else args.guidance}
        identity, processes = [sha256(*model_files(args.model)), device.type], processes_for(device, unet_files(args.model))
    if world_size > 1 and processes > 1:
        torch.set_num_threads(1)  # as in worker processes: with more threads the last bits differ
        processes = 1
    chunks: dict[str, list[Chunk]] = {}
    for concept in rows:
        named = [{"name": f"{i:05d}", **row} for i, row in enumerate(rows[concept])]
        for k, items in enumerate(named[i:i + batch] for i in range(0, len(named), batch)):
            known = [{**row, "sources": sha256(*row["sources"])} if args.images else row for row in items]
            chunks.setdefault(concept, []).append(Chunk(args.out / concept / f"chunks/{k:05d}.json", digest(identity, settings, judge, known), items))
    numbered = enumerate((concept, chunk) for concept in chunks for chunk in chunks[concept])
    mine = [(concept, chunk) for number, (concept, chunk) in numbered if number % world_size == rank]
    todo = [(concept, chunk) for concept, chunk in mine if not chunk.done()]
    results = spread(partial(build, None if args.images else args.model, device, judge), partial(make, settings),
                     [chunk.items for _, chunk in todo], processes) if todo else iter(())
    total, left = (sum(len(chunk.items) for _, chunk in some) for some in (mine, todo))
    with tqdm(total=total, initial=total - left, desc="reading pairs" if args.images else "drawing pairs", unit="pair", disable=rank > 0) as bar:
        for concept in chunks:
            for chunk in (chunk for name, chunk in todo if name == concept):
                store(args.out / concept, chunk, next(results))
                bar.update(len(chunk.items))
            if rank == 0:
                bar.write(gather(args.out / concept, chunks[concept], judge, world_size == 1))


def main(args):
    for flag in ("pairs", "steps", "size", "batch"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise BadInput(f"--{flag} {getattr(args, flag)} leaves nothing to draw; use 1 or more")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise BadInput(f"--guidance {args.guidance} is not a finite number; use one such as 7.5")
    if (args.llm is None) != (args.concepts is None):
        raise BadInput("--llm and --concepts belong together; give both")
    if args.llm and args.prompts:
        raise BadInput("--llm writes the prompts and --prompts reads them; give one of them")
    if args.images and not args.prompts:
        raise BadInput(f"--images {args.images} needs the prompts that belong to its pictures; give --prompts FILE")
    drawing = [f"--{flag}" for flag in ("steps", "guidance", "negative") if getattr(args, flag) not in (None, "")]
    if args.images and drawing:
        raise BadInput(f"{' '.join(drawing)}: nothing is drawn with --images {args.images}; leave it out")
    if args.images and not args.images.is_dir():
        raise BadInput(f"--images {args.images}: no such folder; give the one that holds the pictures")
    rank, world_size = share()
    device = pick_device(local_device(args.device))
    say = print if rank == 0 else lambda text: None
    if args.llm:
        rows, tests = from_files(args, {args.out / "prompts.jsonl": from_language_model(args, device, rank, world_size, say)}, say)
    elif args.prompts:
        default = args.concept if args.concept != "all" else None
        rows, tests = from_files(args, {file: read_prompts(file, args.images, default) for file in args.prompts}, say)
    else:
        rows, tests = from_grammar(args)
    if rows:
        make_pictures(args, device, rows, rank, world_size)
    if rank == 0:
        others = sorted(file.parent.name for file in args.out.glob("*/pairs.jsonl") if file.parent.name not in rows)
        if rows and args.concept == "all" and others:
            print(f"note: {args.out} still holds the pairs of another run, which train.py takes as well: {', '.join(others)}; "
                  "delete them, or use another --out", file=sys.stderr)
        prune(args.out, ".*.tmp", set())
        write_jsonl(args.out / "test.jsonl", firsts(tests, lambda row: row["prompt"]) if args.prompts or args.llm else tests)
        for concept in rows or {row["category"] for row in tests} - {None}:
            write_jsonl(args.out / concept / "test.jsonl", [row for row in tests if row["category"] in (concept, None)])


if __name__ == "__main__":
    run(main, ARGS)
