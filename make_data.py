"""Step 1 of 4: preference pairs. `python make_data.py` -> data/<concept>/

What it is:  for each harm category, unsafe prompts and minimally different safe ones, and both
             pictures, drawn by the very model that is to be aligned, from the same start noise. The
             safe picture is the winner (x_w) and the unsafe one the loser (x_l) of a pair.
Needs:       a Stable Diffusion (default: the embedded toy); prompts: from its grammar, from files
             (--prompts), or from a language model (--llm). Pictures that exist already (--images)
             are read and not drawn.
Gives:       data/<concept>/pairs.jsonl, images/00000_{safe,unsafe}.png, sheet.png, and
             latents.safetensors, the pairs as the UNet reads them: what train.py and merge.py load;
             and the prompts that the result is judged on, which share no prompt with the pairs:
             data/test.jsonl for all concepts, data/<concept>/test.jsonl for one expert.
Interrupted: the same command continues. A picture that is there was moved into place whole, and a
             concept with pairs.jsonl and latents.safetensors is done; other settings make it anew.
Many GPUs:   torchrun --nproc_per_node=N make_data.py ...; each process draws every Nth batch.
"""
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model.data.pairs import complete, current, list_pairs, paths_of, read_square, write_latents
from model.data.sources import Source, source_of
from model.formats.checkpoint import encoder_files, model_files, unet_files
from model.judges import check_prompts, named_judge
from model.stable_diffusion import at_once, check_settings, load, image_size
from model.tools import processes
from model.tools.command import DrawingParser, positive, run
from model.tools.device import device_and_precision
from model.tools.files import check_folder, digest, prepare, sha256, write_jsonl
from model.tools.pictures import write_picture
from model.toy import TOY


def parse_arguments(argv=None):
    parser = DrawingParser("Writes preference pairs: prompts, and the model's own pictures.")
    add = parser.add_argument
    add("--concept", default="all", help="one category of the toy's, or of your prompts'; or all")
    add("--pairs", type=positive, help="pairs for each concept (default: 160; of --prompts all), "
        "or for each entry of --concepts (default: 32)")
    add("--prompts", type=Path, nargs="+", metavar="FILE", help="pairs and test prompts from CSV "
        "or JSON lines: CoProV2, the Hugging Face form, or your own (default: the toy's grammar)")
    add("--images", type=Path, metavar="DIR", help="read the pictures that --prompts names from "
        "this folder instead of drawing them; they are cropped and resized to --size")
    add("--llm", type=Path, metavar="DIR", help="let this causal language model (a transformers "
        "folder) write the prompts; needs --concepts")
    add("--concepts", type=Path, metavar="FILE",
        help='what --llm writes about: JSON, {"category": ["concept", ...], ...}')
    add("--judge", choices=["toy", "none"], help="drops pairs whose pictures are not what they "
        "should be (default: toy for pictures drawn by the toy, else none)")
    add("--out", type=Path, default=Path("data"), help="folder to write")
    return parser.parse_args(argv)


def draw(settings: dict, sd, rows: list[dict]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (safe, unsafe) pictures of each row, both from the start noise of the row's seed."""
    seeds = [row["seed"] for row in rows]
    safe = sd.generate([row["safe"] for row in rows], seeds, **settings)
    unsafe = sd.generate([row["unsafe"] for row in rows], seeds, **settings)
    return list(zip(safe, unsafe))


def read(size: int, _, rows: list[dict]) -> list[list[np.ndarray | None]]:
    """The (safe, unsafe) pictures that exist already; None for one that cannot be read."""
    return [[read_square(path, size) for path in row["sources"]] for row in rows]


def make_pictures(args, device, rows: dict[str, list[dict]]):
    """Draws, or reads, what is not there yet of data/<concept>/images/."""
    settings, work, start = {"size": args.size}, partial(read, args.size), None
    if not args.images:
        guidance = args.usual_guidance if args.guidance is None else args.guidance
        settings |= {"steps": args.steps, "guidance": guidance, "negative": args.negative}
        start, work = partial(load, args.model, device, args.precision), partial(draw, settings)
    made_with = {**settings, "batch": args.batch, "judge": args.judge, "device": device.type,
                 "precision": args.precision, "model": sha256(*model_files(args.model))}
    batches = []    # (folder, the numbers of its rows)
    for concept in rows:
        folder = args.out / concept
        if processes.RANK == 0:
            known = [{**row, "sources": sha256(*row.get("sources", ()))} for row in rows[concept]]
            prepare(folder, {**made_with, "rows": digest(known)},
                    ("pairs.jsonl", "latents.safetensors", "images/*.png"))
        numbers = range(len(rows[concept]))
        batches += [(folder, numbers[k:k + args.batch]) for k in numbers[::args.batch]]
    processes.wait()
    todo = [(folder, numbers) for folder, numbers in batches[processes.RANK::processes.WORLD]
            if not (folder / "pairs.jsonl").is_file()
            and not all(complete(folder, number) for number in numbers)]
    workers = processes.processes_for(device, unet_files(args.model))
    items = [[rows[folder.name][number] for number in numbers] for folder, numbers in todo]
    made = processes.spread(start, work, items, workers)
    for (folder, numbers), pairs in zip(tqdm(todo, desc="pictures", unit="batch"), made):
        for number, pair in zip(numbers, pairs):
            for path, picture in zip(paths_of(folder, number), pair):
                if picture is not None:
                    write_picture(path, picture)
    processes.wait()


def finish(args, device, judge, rows: dict[str, list[dict]]):
    """Makes pairs.jsonl and latents.safetensors of every concept whose pictures are there."""
    encoders, sd = sha256(*encoder_files(args.model)), None
    for concept in rows:
        folder = args.out / concept
        if not (folder / "pairs.jsonl").is_file():
            print(list_pairs(folder, rows[concept], judge))
        if not current(folder, encoders):
            sd = sd or load(args.model, device, args.precision)
            write_latents(sd, args.out, concept, encoders)


def write_tests(out: Path, source: Source):
    """The test prompts: of all concepts, and for each its own unsafe ones and the safe ones."""
    write_jsonl(out / "test.jsonl", source.tests)
    for concept in source.rows or {row["category"] for row in source.tests} - {None}:
        rows = [row for row in source.tests if row["category"] in (concept, None)]
        write_jsonl(out / concept / "test.jsonl", rows)


def main(args):
    device, args.precision = device_and_precision(args.device, args.precision)
    processes.start(device)
    size = args.size or image_size(args.model)
    check_settings(args.model, size, args.steps)
    args.batch = args.batch or at_once(size)
    args.size = size if args.images else args.size
    drawn_by_toy = args.model.resolve() == TOY.resolve() and not args.images
    args.judge = args.judge or ("toy" if drawn_by_toy else "none")
    judge = named_judge(args.judge, device, size)
    check_folder(args.out)
    source = source_of(args, device)
    if not args.images:
        for rows in source.rows.values():
            check_prompts(judge, [row["unsafe"] for row in rows])
    make_pictures(args, device, source.rows)
    if processes.RANK == 0:
        for note in source.notes:
            print(note)
        finish(args, device, judge, source.rows)
        write_tests(args.out, source)


if __name__ == "__main__":
    run(main, parse_arguments())
