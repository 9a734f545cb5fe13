"""The tables of the README, from the four scripts: `python -m model.toy_experiments --seeds 0 1 2`

What it is:  a driver that runs the scripts as a person would, for several seeds (a seed moves everything:
             prompts, pictures, experts, test prompts), and prints mean and range over the seeds.
Needs:       the embedded toy; about 20 to 25 minutes a seed on 2 CPU cores, each of which works at a command of its own.
Gives:       results/seed<k>/ with all files, and on stdout the tables of these experiments (--only):
             A  each expert, one LoRA on all the data, and each merging method; what an expert does to other categories
             B  how an expert is trained: loss, beta, learning rate, reused draws
             C  on how much data: pairs, and concept words
             D  one more category joined at a time
             E  Co-Merge's open choices
             What is already there is not run again. A command that fails leaves a dash in the tables, and exit status 1.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .files import PlainParser, read_jsonl, write_jsonl
from .toy_world import CATEGORIES, parse, seen_words

ONE = next(iter(CATEGORIES))              # the category of B and C, and the first one of D

# A. merge.py --method ...: strengths. Each at strength 1 and around its own best, so that trade-offs are compared and not
# scales. (average is sum at another strength: 1/7, 2/7, ...) joint: the paper's All-single, by train.py --joint.
METHODS = {"co-merge": (1, 1.2), "co-merge --no-rescale": (1, 1.5), "co-merge --score wins": (1,), "average": (1,),
           "sum": (1, 0.45), "ties": (1, 2), "dare": (1, 0.45), "random": (1, 2.5), "joint": (1,)}
# B. how an expert is trained: train.py's flags, which are the row's title as well.
TRAINING = ("", "--beta 500", "--beta 5000", "--lr 0.004", "--reuse 1", "--reuse 8",
            "--loss dpo --beta 500", "--loss dpo --beta 5000",                              # the last one: as published
            "--loss dpo+safe --beta 500", "--loss duo --beta 500", "--loss sdpo --beta 500")
# C. (pairs, concept words): the first such pairs of MOST_PAIRS, of which one word of four has 64. 160 and 4: the default.
DATA = ((4, 4), (16, 4), (64, 4), (160, 4), (256, 4), (64, 1))
MOST_PAIRS = 320
# E. Co-Merge's choices, likewise; and how many pairs of each expert calibrate it (merge.py's own number: 24).
CHOICES = ("co-merge", "co-merge --no-rescale", "co-merge --score wins", "co-merge --top-k 2")
CALIBRATION = (1, 4)

UNSAFE, SAFE = ("IP seen", "IP held-out", "IP held-out phrasing", "scene"), ("safe: scene", "safe: accessory", "safe: nothing added", "safe: IP")
ERRORS, EACH = ("winner's error", "loser's error"), tuple(f"{c}: IP" for c in CATEGORIES)
TABLES = {                                # name: (title, columns), see figures()
    "A1": ("expert on its own category", (*UNSAFE, "others: IP", *SAFE)),
    "A2": ("IP of expert × category", EACH),
    "A3": ("on all categories", (*UNSAFE, *SAFE)),
    "A4": ("IP at strength 1 × category", EACH),
    "B": (f"training of {ONE}", (*UNSAFE, *SAFE, *ERRORS)),
    "C": (f"data of {ONE}", (*UNSAFE, *SAFE, *ERRORS)),
    "D": ("on the joined categories", (f"{ONE}: IP", *UNSAFE, "others: IP", *SAFE)),
    "E": ("on all categories", (*UNSAFE, *SAFE)),
}


class Row(NamedTuple):
    """A row of a table. judged: its judge.json; own: the categories that its LoRA is for; lora: that LoRA (base: none)."""
    judged: Path
    own: tuple[str, ...]
    lora: Path | None


def slug(name: str) -> str:
    return re.sub("[^a-z0-9.+]+", "-", name.lower()).strip("-")


def plan(folder: Path, seed: int, only: str) -> tuple[dict[str, dict[str, Row]], list[dict[Path, list]]]:
    """({table: {title: Row}}, stages) of one seed. A stage is {file: the command that makes it}, in the order of starting;
    it needs earlier stages alone. A command is a script and its arguments; or "subset" and those of subset()."""
    data, tables = folder / "data", {name: {} for name in TABLES}
    make, cut, train, merge, judge = stages = [{}, {}, {}, {}, {}]

    def trained(file: Path, *flags, source: Path = data) -> Path:
        train[file] = ["train.py", *flags, "--data", source, "--out", file.parent, "--seed", seed]
        return file

    def merged(name: str, experts: list[Path], flags: str = "", source: Path = data) -> Path:
        file = folder / f"{slug(name)}.safetensors"
        merge[file] = ["merge.py", *experts, *flags.split(), "--data", source, "--out", file, "--seed", seed]
        return file

    def judged(name: str, lora: Path | None, own=CATEGORIES, strength=1, prompts: Path = data / "test.jsonl") -> Row:
        file = folder / "judged" / slug(name) / "judge.json"
        judge[file] = ["sample.py", "--prompts", prompts, "--judge", "--out", file.parent, "--seed", 10_000_000 + 1000 * seed,
                       *(["--lora", f"{lora}@{strength}"] if lora else [])]
        return Row(file, tuple(own), lora)

    def one(name: str, *flags, source: Path = data) -> Row:
        own = flags or source != data     # else it is the expert that all experiments share
        file = trained(folder / (f"runs/{slug(name)}" if own else "experts") / f"{ONE}.safetensors", "--concept", ONE, *flags, source=source)
        return judged(f"run {name}", file, (ONE,), prompts=data / ONE / "test.jsonl")

    def fewer(name: str, source: Path, concepts, pairs: int, words: int | None = None) -> Path:
        for c in concepts:
            cut[folder / name / c / "pairs.jsonl"] = ["subset", source / c / "pairs.jsonl", pairs, seen_words(c)[:words]]
        return folder / name

    make[data / "test.jsonl"] = ["make_data.py", "--out", data, "--seed", seed]
    joint, experts = folder / "joint.safetensors", [folder / f"experts/{c}.safetensors" for c in CATEGORIES]
    if "A" in only:
        trained(joint, "--joint")         # the longest first
        tables["A2"]["base"] = tables["A3"]["base"] = judged("base", None)
        for c, expert in zip(CATEGORIES, experts):
            tables["A1"][c] = tables["A2"][c] = judged(f"expert {c}", expert, (c,))
        for name, strengths in METHODS.items():
            file = joint if name == "joint" else merged(name, experts, f"--method {name}")
            for s in strengths:
                tables["A3"][f"{name} × {s}"] = judged(f"{name} {s}", file, strength=s)
            tables["A4"][name] = tables["A3"][f"{name} × 1"]
    if set("ADE") & set(only):
        for c, expert in zip(CATEGORIES, experts):
            trained(expert, "--concept", c)
    if "B" in only:
        tables["B"] = {flags or "default": one(flags or "default", *flags.split()) for flags in TRAINING}
    if "C" in only:
        make[folder / "more/test.jsonl"] = ["make_data.py", "--concept", ONE, "--pairs", MOST_PAIRS, "--out", folder / "more", "--seed", seed]
        for pairs, words in DATA:
            name = f"{pairs} pairs, {words} word{'s' * (words > 1)}"
            tables["C"][name] = one(name, source=fewer(slug(name), folder / "more", [ONE], pairs, words))
    if "D" in only:
        tables["D"]["1 joined"] = judged(f"expert {ONE}", experts[0], (ONE,))                  # as in A
        for n in range(2, len(experts)):
            tables["D"][f"{n} joined"] = judged(f"joined {n}", merged(f"joined {n}", experts[:n]), list(CATEGORIES)[:n])
        tables["D"][f"{len(experts)} joined"] = judged("co-merge 1", merged("co-merge", experts, "--method co-merge"))
    if "E" in only:
        picture = folder / "owners.png"   # which layers each expert wins
        merge[picture] = ["merge.py", *experts, "--data", data, "--out", folder / "reported.safetensors", "--seed", seed, "--report", picture]
        for name in CHOICES:
            tables["E"][name] = judged(f"{name} 1", merged(name, experts, f"--method {name}"))
        for pairs in CALIBRATION:
            name = f"calibration pairs {pairs}"
            tables["E"][name] = judged(name, merged(name, experts, source=fewer(slug(name), data, CATEGORIES, pairs)))
    return tables, stages


def subset(file: Path, source: Path, pairs: int, words: tuple[str, ...]):
    """Writes as `file` the first `pairs` rows of another pairs.jsonl whose concept word is one of `words`, and copies their
    pictures. Raises ValueError if there are fewer."""
    rows = [row for row in read_jsonl(source) if parse(row["unsafe"]).extra in words][:pairs]
    if len(rows) < pairs:
        raise ValueError(f"{source}: {len(rows)} pairs of {', '.join(words)}, not {pairs}")
    (file.parent / "images").mkdir(parents=True, exist_ok=True)
    for name in (row[key] for row in rows for key in ("safe_image", "unsafe_image")):
        shutil.copyfile(source.parent / name, file.parent / name)
    write_jsonl(file, rows)


def run(stage: dict[Path, list]) -> list[Path]:
    """Makes what is not there, one command on each core at a time. A script sees ONE core and runs as one process, which
    changes no byte of what it writes. Prints commands with their seconds; returns the files whose command failed."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else [None] * (os.cpu_count() or 1)
    free = iter(cores)

    def take_core():  # affinity is a thread's own, and passes on to the processes that it starts
        if (core := next(free)) is not None:
            os.sched_setaffinity(0, {core})

    def start(job) -> Path | None:
        (file, (name, *arguments)), began = job, time.monotonic()
        if name == "subset":
            return subset(file, *arguments)
        done = subprocess.run([sys.executable, name, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        print(f"+ {time.monotonic() - began:.0f} s: python {name}", *arguments, flush=True)
        if done.returncode:
            print("  failed:", *done.stderr.strip().splitlines()[-1:], flush=True)
            return file

    pool = ThreadPoolExecutor(len(cores), initializer=take_core)
    try:
        return [file for file in pool.map(start, [job for job in stage.items() if not job[0].exists()]) if file]
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, which the running commands have had too, no other starts


def figures(row: Row) -> dict[str, float]:
    """{column: figure in %}: those of sample.py's tally, of the row's own categories together; "<category>: IP" and "others:
    IP" over seen and held-out words; the last tenth of the steps' errors, as shares of the reference's. {} if not there."""
    if not row.judged.exists():
        return {}
    (tally,) = json.loads(row.judged.read_text())["columns"].values()
    groups = {kind: [f"{c}: {kind}" for c in row.own] for kind in UNSAFE} | {key: [key] for key in SAFE}
    groups |= {f"{c}: IP": [f"{c}: IP seen", f"{c}: IP held-out"] for c in CATEGORIES}
    groups["others: IP"] = [key for c in CATEGORIES if c not in row.own for key in groups[f"{c}: IP"]]
    counts = {name: [tally[key] for key in keys if key in tally] for name, keys in groups.items()}
    found = {name: 100 * sum(hits for hits, _ in pairs) / sum(n for _, n in pairs) for name, pairs in counts.items() if pairs}
    if row.lora and (log := row.lora.with_suffix(".jsonl")).exists():
        steps = read_jsonl(log)
        steps = steps[-max(1, len(steps) // 10):]
        found |= {f"{side}'s error": 100 * sum(s[side] for s in steps) / sum(s[f"{side}_ref"] for s in steps) for side in ("winner", "loser")}
    return found


def spread(values: list[float]) -> str:
    """mean (lowest–highest), or the mean alone where they are the same to the digits shown; – for none."""
    if not values:
        return "–"
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{sum(values) / len(values):.1f}" + (f" ({low}–{high})" if low != high else "")


def table(title: str, rows: dict[str, list[dict]], columns) -> str:
    """A Markdown table of {row's title: the figures of each seed}."""
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(spread([f[c] for f in seeds if c in f]) for c in columns) + " |" for name, seeds in rows.items()])


def main():
    parser = PlainParser("Runs the scripts for several seeds and prints the README's tables.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the whole story (default: 0 1 2)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write (default: results)")
    parser.add_argument("--only", nargs="+", choices=list("ABCDE"), default=list("ABCDE"), help="experiments to run and print (default: A B C D E)")
    args = parser.parse_args()
    plans = [plan(args.out / f"seed{seed}", seed, "".join(args.only)) for seed in args.seeds]
    failed = []
    for stages in zip(*(stages for _, stages in plans)):           # the same stage of all seeds
        failed += run({file: command for stage in stages for file, command in stage.items()})
    print(f"\nseeds {args.seeds}: mean (lowest–highest), in %")
    for name, (title, columns) in TABLES.items():
        if rows := plans[0][0][name]:
            print(f"\n{name}.\n\n" + table(title, {row: [figures(tables[name][row]) for tables, _ in plans] for row in rows}, columns))
    return f"\n{len(failed)} commands failed; the first was for {failed[0]}" if failed else 0


if __name__ == "__main__":
    sys.exit(main())
