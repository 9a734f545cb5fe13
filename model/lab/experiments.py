"""The tables and the plot of results.md: `python -m model.lab.experiments`

What it is:  a driver that runs the scripts as a person would, in a folder for each seed (a seed
             moves everything: prompts, images, experts, test prompts). Strengths are chosen on
             the --tune seeds, and reported on the others.
Needs:       the embedded toy; about an hour for each seed and core, all of it.
Gives:       results/seed<k>/ with all files; results/plot.png; and on stdout these tables (--only),
             of means and ranges over the --seeds:
                 b  merging rules, and the base
                 c  All-single, the paper's baseline
             What is there is not made again. Seed, table() and best() serve model/rivals too.

A method is a curve over its strength: stronger means less harm, and more damage. Each is judged at
several strengths; its best is where IP + damage is least.
"""
import contextlib
import importlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import merge
from lora import Factors
from model.lab.plot import plot
from model.tools.command import PlainParser, natural_int, run
from model.tools.files import read_json, read_jsonl, write_jsonl
from model.toy.world import CATEGORIES

GRID = (0.7, 1)
# b. merge.py's flags; a rule has a scale of its own.
RULES = {"co-merge": ("", GRID), "regmean": ("--method regmean", (1,)),
         "solve": ("--method solve", (1,)),
         "average": ("--method average", (1,)),    # a seventh of the sum
         "sum": ("--method sum", (0.5, 0.7)), "ties": ("--method ties", (1, 1.4)),
         "dare": ("--method dare", (0.5, 0.7)),
         "random": ("--method model.lab.experiments.random_rows", (1, 2)),
         "largest rows": ("--method model.lab.experiments.largest_rows", (1, 1.5))}
OF_JOINT = (0.5, 0.7, 1)    # c. strengths
PLOTTED = "co-merge", "regmean", "solve", "ties", "joint"

UNSAFE = ("IP seen", "IP held-out", "IP held-out phrasing", "scene")
SAFE = ("safe: scene", "safe: accessory", "safe: nothing added", "safe: IP")
KEPT = ("scene", *SAFE[:3])    # what damage takes away
COLUMNS = ("IP", "kept", *UNSAFE, *SAFE)    # IP: of seen and held-out words
Curve = dict[float, dict[str, float]]    # {strength: figures()}


def slug(name: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")


class Seed(NamedTuple):
    """A seed and its folder. Each method makes files there, unless they are there already."""
    number: int
    folder: Path

    def first_noise(self) -> int:
        """The seed of the first test image: start noise that no image of the pairs had."""
        return 10_000_000 + 1000 * self.number

    def make(self, line: str, *files: str, seed: int | None = None):
        """Runs a script, which makes these files. line: its name and arguments."""
        if all((self.folder / file).exists() for file in files):
            return
        print(f"seed {self.number}: {line}", file=sys.stderr)
        name, *words = line.split()
        script = importlib.import_module(name)
        words += ["--seed", str(self.number if seed is None else seed)]
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(sys.stderr):
            script.main(script.parse_arguments(words))

    def make_data(self):
        """The pairs, and half.jsonl: the test prompts that are judged, all safe ones and half of
        the unsafe."""
        self.make("make_data", "data/test.jsonl")
        rows = read_jsonl(self.folder / "data/test.jsonl")
        write_jsonl(self.folder / "half.jsonl", [row for i, row in enumerate(rows)
                                                 if row["category"] is None or i % 4 < 2])

    def joint(self, name: str, flags="") -> str:
        out = f"joint/{slug(name)}"
        self.make(f"train --joint --out {out} {flags}", f"{out}/joint.safetensors")
        return f"{out}/joint.safetensors"

    def merge(self, name: str, flags="") -> str:
        experts = [f"experts/default/{concept}.safetensors" for concept in CATEGORIES]
        self.make("train --out experts/default", *experts)
        file = f"merged/{slug(name)}.safetensors"
        self.make(f"merge {' '.join(experts)} --out {file} {flags}", file)
        return file

    def judge(self, lora: str | None, strengths=(1,)) -> Curve:
        curve = {}
        for strength in strengths:
            out = "judged/" + slug(f"{lora} {strength}")
            line = f"sample --prompts half.jsonl --judge --out {out}"
            line += f" --lora {lora}@{strength}" if lora else ""
            self.make(line, f"{out}/judge.json", seed=self.first_noise())
            counts, = read_json(self.folder / out / "judge.json")["columns"].values()
            curve[strength] = figures(counts)
        return curve


# An experiment makes what it needs for a seed, and returns {row's title: Curve}.

def rules(seed: Seed):
    rows = {"base": seed.judge(None)}
    for name, (flags, strengths) in RULES.items():
        rows[name] = seed.judge(seed.merge(name, flags), strengths)
    return rows


def joint(seed: Seed):
    """All-single: one LoRA for as many steps as all experts together."""
    return {"joint": seed.judge(seed.joint("joint"), OF_JOINT)}


EXPERIMENTS = {"b": rules, "c": joint}


def random_rows(parts: list[Factors], layer: merge.Layer) -> Factors:
    """Rows dealt out at random, a control."""
    owner = torch.randint(len(parts), (len(parts[0].up),), generator=layer.rng)
    return merge.keep_rows(parts, owner)


def largest_rows(parts: list[Factors], layer: merge.Layer) -> Factors:
    """Co-Merge without data: unit j goes to the expert with the largest row j of delta W."""
    sizes = torch.stack([f.delta().norm(dim=1) for f in parts])    # [n, O]
    return merge.keep_rows(parts, sizes.argmax(0))


def figures(counts: dict[str, dict]):
    """{column: figure in %} of a column of judge.json; a category: IP on seen and held-out words.
    Without what was not asked for."""
    found, sums = {}, {c: [f"{c}: IP seen", f"{c}: IP held-out"] for c in CATEGORIES}
    sums["IP"] = ["all: IP seen", "all: IP held-out"]
    sums |= {kind: [f"all: {kind}"] for kind in UNSAFE} | {key: [key] for key in SAFE}
    for column, keys in sums.items():
        counted = [counts[key] for key in keys if key in counts]
        if counted:
            total = sum(figure["total"] for figure in counted)
            found[column] = 100 * total / sum(figure["n"] for figure in counted)
    found["kept"] = mean([found[key] for key in KEPT])
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def best(tuned: list[Curve]) -> float:
    """The strength, or knob, where IP + damage is least over these seeds."""
    def cost(strength) -> float:
        return sum(curve[strength]["IP"] - curve[strength]["kept"] for curve in tuned)
    return min(tuned[0], key=cost)


def cell(values: list[float]) -> str:
    """mean (lowest–highest), or the mean alone where both are the same to the digit shown."""
    if not values:
        return "–"
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{mean(values):.1f}" + (f" ({low}–{high})" if low != high else "")


def table(title: str, rows, columns) -> str:
    """A Markdown table of {row's title: the figures of each seed}."""
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in rows.items():
        values = lambda column: [found[column] for found in seeds if column in found]
        cells = [cell(values(column)) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(group: str, reported, tuned) -> dict:
    """Prints the tables of a group: all strengths, and the best by category. reported, tuned: the
    rows of each seed. Returns curves for the plot: {title: [(kept, IP, strength)]}, means."""
    shown, chosen, curves = {}, {}, {}
    for title, strengths in reported[0].items():
        best_strength, curves[title] = best([rows[title] for rows in tuned]), []
        for strength in strengths:
            seeds = [rows[title][strength] for rows in reported]
            mark = f" × {strength:g}" + " (best)" * (strength == best_strength)
            name = title + mark * (len(strengths) > 1)
            shown[name] = seeds
            if strength == best_strength:
                chosen[name] = seeds
            kept, harm = (mean([found[key] for found in seeds]) for key in ("kept", "IP"))
            curves[title].append((kept, harm, f"{strength:g}"))
    print(f"\n{table(group, shown, COLUMNS)}\n\n{table('IP, ' + group, chosen, CATEGORIES)}")
    return curves


def seeds_of(out: Path, numbers: list[int]) -> list[Seed]:
    """With their data."""
    seeds = [Seed(number, out.resolve() / f"seed{number}") for number in numbers]
    for seed in seeds:
        seed.make_data()
    return seeds


def flags(description: str, names, tuned="") -> PlainParser:
    """Of a program that compares these, or some of them (--only), for several seeds. tuned: what is
    chosen on seeds of its own, if anything."""
    parser = PlainParser(description)
    add = parser.add_argument
    add("--seeds", type=natural_int, nargs="+", default=[0, 1, 2], help="seeds that are reported")
    add("--only", nargs="+", choices=names, default=list(names), help="which of them")
    add("--out", type=Path, default=Path("results"), help="folder to write")
    if tuned:
        add("--tune", type=natural_int, nargs="+", default=[100],
            help=f"seeds that {tuned} are chosen on")
    return parser


def parse_arguments(argv=None):
    return flags("Runs the scripts for several seeds and prints the tables of results.md.",
                 EXPERIMENTS, "strengths").parse_args(argv)


def main(args):
    seeds, tune, curves = seeds_of(args.out, args.seeds), seeds_of(args.out, args.tune), {}
    print(f"seeds {args.seeds}: mean (lowest–highest), in %; best strengths by seeds {args.tune}")
    for group in sorted(args.only):
        experiment = EXPERIMENTS[group]
        curves |= report(group, list(map(experiment, seeds)), list(map(experiment, tune)))
    curves = {title: curves[title] for title in PLOTTED if title in curves}
    if curves:
        plot(args.out / "plot.png", curves,
             ("kept, %: scenes, accessories, nothing added", "IP, %"),
             (range(80, 101, 4), range(0, 26, 5)))


if __name__ == "__main__":
    run(main, parse_arguments())
