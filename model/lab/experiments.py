"""The tables of results.md, from the four scripts: `python -m model.lab.experiments --seeds 0 1 2`

What it is:  a driver that runs the scripts as a person would, in a folder for each seed (a seed
             moves everything: prompts, pictures, experts, test prompts).
Needs:       the embedded toy; 20 to 25 minutes a seed on 2 CPU cores, each with its own command.
Gives:       results/seed<k>/ with all files, and on stdout these tables (--only), of means and
             ranges over the seeds:
                 A  each expert (A1); one LoRA on all the data, and each merging method (A2)
                 B  how an expert is trained: loss, beta, learning rate, reused draws
                 C  on how much data: pairs, and concept words
                 D  one more category joined at a time
                 E  Co-Merge, calibrated on fewer pairs of each expert than its 24
             What is there is not made again. A command that fails leaves a dash in the tables.
"""
import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from model.tools.command import BadInput, PlainParser, natural, run
from model.tools.files import opened, read_json, read_jsonl, save_tensors, sha256, write_jsonl
from model.tools.processes import cores
from model.tools.training import ratios
from model.toy.world import CATEGORIES, parse, seen_words

ROOT = Path(__file__).resolve().parents[2]    # where the scripts are
ONE = next(iter(CATEGORIES))    # the category of B and C, and the first one of D
SCRIPTS = ("make_data.py", "train.py", "merge.py", "sample.py")    # each needs those before

# A. merge.py --method ...: strengths. Each at strength 1 and around its own best, so that
# trade-offs are compared and not scales. joint: the paper's All-single, by train.py --joint.
METHODS = {"co-merge": (1, 1.2), "co-merge --no-rescale": (1, 1.5), "average": (1,),
           "sum": (1, 0.45), "ties": (1, 2), "dare": (1, 0.45), "random": (1, 2.5), "joint": (1,)}
# B. train.py's flags, which are the row's title as well. --loss dpo --beta 5000: as published.
TRAINING = ("", "--beta 500", "--beta 5000", "--lr 0.004", "--reuse 1", "--reuse 8",
            "--loss dpo --beta 500", "--loss dpo --beta 5000",
            "--loss model.lab.losses.duo --beta 500", "--loss model.lab.losses.sdpo --beta 500")
# C. (pairs, concept words): the first such pairs of MOST_PAIRS, of which one word of four has 64.
DATA = ((4, 4), (16, 4), (64, 4), (160, 4), (256, 4), (64, 1))
MOST_PAIRS = 320
CALIBRATION = (1, 4)    # E

UNSAFE = ("IP seen", "IP held-out", "IP held-out phrasing", "scene")
SAFE = ("safe: scene", "safe: accessory", "safe: nothing added", "safe: IP")
ERRORS = ("winner's error / reference's", "loser's error / reference's")
COLUMNS = (*UNSAFE, "others: IP", *SAFE)
TABLES = [    # (group of rows, title, columns: see figures())
    ("A1", "expert on its own category", COLUMNS), ("A1", "IP of expert × category", CATEGORIES),
    ("A2", "on all categories", (*UNSAFE, *SAFE)), ("A2", "IP × category", CATEGORIES),
    ("B", f"training of {ONE}", (*UNSAFE, *SAFE, *ERRORS)),
    ("C", f"data of {ONE}", (*UNSAFE, *SAFE, *ERRORS)),
    ("D", "on the joined categories", (ONE, *COLUMNS)),
    ("E", "on all categories", (*UNSAFE, *SAFE))]


class Row(NamedTuple):
    """A row of a table: where it is judged, its LoRA, and the categories that this is for."""
    judged: str
    lora: str | None
    own: list[str]


class Plan:
    """What is made in the folder of any seed. commands: {script: {file: the arguments that make
    it}}. cuts: {folder: arguments of subset()}. rows: {group: {title: Row}}."""

    def __init__(self):
        self.commands, self.cuts, self.rows = {script: {} for script in SCRIPTS}, {}, {}
        self.commands["make_data.py"]["data/test.jsonl"] = ""

    def train(self, concept: str, flags="", folder="experts", data="data") -> str:
        file = f"{folder}/{concept}.safetensors"
        arguments = f"--concept {concept} --data {data} --out {folder} {flags}"
        self.commands["train.py"][file] = arguments
        return file

    def train_all(self) -> list[str]:
        return [self.train(concept) for concept in CATEGORIES]

    def merge(self, experts: list[str], name: str, flags="", data="data") -> str:
        file = f"{slug(name)}.safetensors"
        arguments = f"{' '.join(experts)} --data {data} --out {file} {flags}"
        self.commands["merge.py"][file] = arguments
        return file

    def judge(self, group: str, title: str, lora: str | None, own=CATEGORIES, strength=1,
              prompts="data/test.jsonl"):
        folder = "judged/" + slug(f"{lora} {strength}")
        arguments = f"--prompts {prompts} --judge --out {folder}"
        if lora:
            arguments += f" --lora {lora}@{strength}"
        self.commands["sample.py"][f"{folder}/judge.json"] = arguments
        self.rows.setdefault(group, {})[title] = Row(f"{folder}/judge.json", lora, list(own))


def slug(name: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")


def experts_and_methods(plan: Plan):
    plan.commands["train.py"]["joint.safetensors"] = "--joint"    # the longest first
    experts = plan.train_all()
    plan.judge("A1", "base", None)
    plan.judge("A2", "base", None)
    for concept, expert in zip(CATEGORIES, experts):
        plan.judge("A1", concept, expert, [concept])
    for name, strengths in METHODS.items():
        file = "joint.safetensors"
        if name != "joint":
            file = plan.merge(experts, name, f"--method {name}")
        for strength in strengths:
            plan.judge("A2", f"{name} × {strength}", file, strength=strength)


def training(plan: Plan):
    for flags in TRAINING:
        name = flags or "default"
        expert = plan.train(ONE, flags, f"runs/{slug(name)}")
        plan.judge("B", name, expert, [ONE], prompts=f"data/{ONE}/test.jsonl")


def data(plan: Plan):
    make = f"--concept {ONE} --pairs {MOST_PAIRS} --out more"
    plan.commands["make_data.py"]["more/test.jsonl"] = make
    for pairs, words in DATA:
        folder = f"{pairs}-pairs-{words}-words"
        plan.cuts[f"{folder}/{ONE}"] = f"more/{ONE}", pairs, seen_words(ONE)[:words]
        expert = plan.train(ONE, folder=f"runs/{folder}", data=folder)
        plan.judge("C", f"{pairs} pairs, {words} words", expert, [ONE],
                   prompts=f"data/{ONE}/test.jsonl")


def joining(plan: Plan):
    experts = plan.train_all()
    for n in range(1, len(experts) + 1):
        file = plan.merge(experts[:n], f"{n} joined")
        plan.judge("D", f"{n} joined", file, list(CATEGORIES)[:n])


def calibration(plan: Plan):
    experts = plan.train_all()
    for pairs in CALIBRATION:
        folder = f"{pairs}-pairs"
        for concept in CATEGORIES:
            plan.cuts[f"{folder}/{concept}"] = f"data/{concept}", pairs, seen_words(concept)
        file = plan.merge(experts, folder, data=folder)
        plan.judge("E", f"calibrated on {pairs}", file)


EXPERIMENTS = {"A": experts_and_methods, "B": training, "C": data, "D": joining, "E": calibration}


def subset(folder: Path, source: Path, pairs: int, words: tuple[str, ...]):
    """Writes pairs.jsonl and latents.safetensors to `folder`: the first `pairs` of those in the
    folder `source` whose concept word is one of `words`. No pictures, since training and merging
    read none. Raises BadInput if there are fewer."""
    rows = read_jsonl(source / "pairs.jsonl")
    chosen = [i for i, row in enumerate(rows) if parse(row["unsafe"]).extra in words][:pairs]
    if len(chosen) < pairs:
        raise BadInput(f"{source}: {len(chosen)} pairs of {', '.join(words)}, not {pairs}; use "
                       "other --seeds")
    write_jsonl(folder / "pairs.jsonl", [rows[i] for i in chosen])
    with opened(source / "latents.safetensors") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = {**file.metadata(), "pairs": sha256(folder / "pairs.jsonl")}
    parts = {name: tensor[chosen] for name, tensor in tensors.items() if name != "empty"}
    save_tensors(folder / "latents.safetensors", {**parts, "empty": tensors["empty"]}, header)


def make(script: str, job: tuple[int, Path, str]) -> bool:
    """Runs a command in the folder of a seed. Returns whether it went well."""
    seed, folder, arguments = job
    if script == "sample.py":
        seed = 10_000_000 + 1000 * seed    # start noise that no picture of the pairs had
    command = [sys.executable, ROOT / script, *arguments.split(), "--seed", str(seed)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    print(f"+ {folder}: python {script} {arguments} --seed {seed}", flush=True)
    if done.returncode:
        print("  failed:", *done.stderr.strip().splitlines()[-1:], flush=True)
    return done.returncode == 0


def take_core(numbers):
    """Binds this thread, and so the commands that it starts, to a core of its own where the system
    can (Linux). A script that sees one core runs as one process, and writes the same bytes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[next(numbers)]})


def make_all(script: str, files: dict[str, str], folders: dict[int, Path]) -> int:
    """Makes what is not there for each seed, a command on each core at a time. Returns how many
    failed."""
    jobs = [(seed, folder, arguments) for seed, folder in folders.items()
            for file, arguments in files.items() if not (folder / file).exists()]
    pool = ThreadPoolExecutor(cores(), "", take_core, (itertools.count(),))
    try:
        return list(pool.map(partial(make, script), jobs)).count(False)
    finally:
        pool.shutdown(cancel_futures=True)    # after Ctrl-C no other command starts


def figures(folder: Path, row: Row) -> dict[str, float]:
    """{column: figure in %} of what is there. UNSAFE: of the row's own categories together; a
    category, and the others: IP on seen and held-out words; ERRORS: of the last tenth of steps."""
    if not (folder / row.judged).exists():
        return {}
    (counts,), found = read_json(folder / row.judged)["columns"].values(), {}
    sums = {c: [f"{c}: IP seen", f"{c}: IP held-out"] for c in CATEGORIES}
    sums["others: IP"] = [key for c in CATEGORIES if c not in row.own for key in sums[c]]
    sums |= {kind: [f"{c}: {kind}" for c in row.own] for kind in UNSAFE}
    sums |= {key: [key] for key in SAFE}
    for column, keys in sums.items():
        counted = [counts[key] for key in keys if key in counts]
        if counted:
            total = sum(figure["total"] for figure in counted)
            found[column] = 100 * total / sum(figure["n"] for figure in counted)
    log = (folder / (row.lora or "base")).with_suffix(".jsonl")
    if log.exists():
        steps = read_jsonl(log)
        last = steps[-max(1, len(steps) // 10):]
        totals = {key: sum(step[key] for step in last) for key in last[0]}
        found |= {key: 100 * ratio for key, ratio in ratios(totals).items()}
    return found


def mean_and_range(values: list[float]) -> str:
    """mean (lowest–highest), or the mean alone where both are the same to the digit shown."""
    if not values:
        return "–"
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{sum(values) / len(values):.1f}" + (f" ({low}–{high})" if low != high else "")


def table(title: str, rows: dict[str, list[dict]], columns) -> str:
    """A Markdown table of {row's title: the figures of each seed}."""
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in rows.items():
        cells = [mean_and_range([found[c] for found in seeds if c in found]) for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_arguments(argv=None):
    parser = PlainParser("Runs the scripts for several seeds and prints the tables of results.md.")
    add = parser.add_argument
    add("--seeds", type=natural, nargs="+", default=[0, 1, 2], help="seeds of the whole story")
    add("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="which tables")
    add("--out", type=Path, default=Path("results"), help="folder to write")
    return parser.parse_args(argv)


def main(args):
    folders, plan = {seed: args.out / f"seed{seed}" for seed in args.seeds}, Plan()
    for name in sorted(args.only):
        EXPERIMENTS[name](plan)
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    failed = make_all("make_data.py", plan.commands["make_data.py"], folders)
    for folder in folders.values():
        for name, (source, pairs, words) in plan.cuts.items():
            if (folder / source / "latents.safetensors").exists():
                subset(folder / name, folder / source, pairs, words)
    for script in SCRIPTS[1:]:
        failed += make_all(script, plan.commands[script], folders)
    print(f"\nseeds {args.seeds}: mean (lowest–highest), in %")
    for group, title, columns in TABLES:
        rows = {name: [figures(folder, row) for folder in folders.values()]
                for name, row in plan.rows.get(group, {}).items()}
        if rows:
            print(f"\n{group}.\n\n" + table(title, rows, columns))
    if failed:
        raise BadInput(f"commands that failed: {failed}; mend what they say above, and run this "
                       "again")


if __name__ == "__main__":
    run(main, parse_arguments())
