"""The tables and the plot of results.md: `python -m model.lab.experiments`

What it is:  a driver that runs the scripts as a person would, in a folder for each seed (a seed
             moves everything: prompts, pictures, experts, test prompts). Strengths are chosen on
             the --tune seeds, and reported on the others.
Needs:       the embedded toy; about an hour for each seed and core, all of it.
Gives:       results/seed<k>/ with all files; results/plot.png; and on stdout these tables (--only),
             of means and ranges over the --seeds:
                 a  the experts' loss: ours, fine-tuning, the published one; by two rules
                 b  merging rules
                 c  All-single, the paper's baseline, in three readings
                 d  1 to 7 experts joined
                 e  how much data, for the category that is hardest
                 f  each expert on every category
                 g  the published loss over β
             What is there is not made again. A command that fails leaves a dash in the tables.

A method is a curve over its strength: stronger means less harm, and more damage. In a, b and c each
is judged at several strengths; its best is where IP + damage is least.
"""
import contextlib
import importlib
import os
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import merge
from lora import Factors
from model.lab.plot import plot
from model.tools import processes
from model.tools.command import BadInput, PlainParser, natural, run
from model.tools.files import opened, read_json, read_jsonl, save_tensors, sha256, write_jsonl
from model.toy.world import CATEGORIES, parse, seen_words

SCRIPTS = ("make_data", "train", "merge", "sample")    # each needs those before it
GRID = (0.7, 1, 1.4)
# a. train.py's flags of each row, and the strengths. "dpo" is the default without its second term;
# "sft" has another term in place of its first.
LOSSES = {"default": ("", GRID), "sft": ("--loss sft", GRID),
          "dpo": ("--loss dpo", (0.35, 0.5, 0.7, 1))}
# b. merge.py's flags; a rule has a scale of its own.
RULES = {"co-merge": ("", GRID), "regmean": ("--method regmean", (1, 1.2)),
         "average": ("--method average", (1,)),    # a seventh of the sum
         "sum": ("--method sum", (0.5, 0.7, 1)), "ties": ("--method ties", (1, 1.4)),
         "dare": ("--method dare", (0.5, 0.7, 1)), "random": ("--method random", (1, 2, 3)),
         "largest rows": ("--method largest", (1, 1.5))}
# c. All-single: steps for each category, so that a seventh of the default is one expert's budget.
JOINT = {"joint, an expert's steps": "--steps 16", "joint, all experts' steps": "",
         "joint, all their steps and ranks": "--rank 28"}
OF_JOINT = (0.5, 0.7, 1)    # strengths
HARDEST = "sexual"
# e. (pairs, concept words): the first such pairs of MOST_PAIRS, of which one word of four has 64.
DATA = ((4, 4), (16, 4), (64, 4), (160, 4), (256, 4), (64, 2), (64, 1))
MOST_PAIRS = 320
# g. The published loss, by Co-Merge, at these strengths.
BETAS, OF_BETAS = (2, 50, 500), (0.35, 0.7)

UNSAFE = ("IP seen", "IP held-out", "IP held-out phrasing", "scene")
SAFE = ("safe: scene", "safe: accessory", "safe: nothing added", "safe: IP")
KEPT = ("scene", *SAFE[:3])    # what damage takes away
COLUMNS = ("IP", "kept", *UNSAFE, *SAFE, "others: IP")    # IP: of seen and held-out words


class Row(NamedTuple):
    """One judged folder, and the categories that its LoRA is for."""
    judged: str
    own: list[str]


class Plan:
    """What is made in the folder of a seed. commands: {script: {file: the arguments that make
    it}}. cuts: {folder: arguments of subset()}. rows: {group: {title: {strength: Row}}}."""

    def __init__(self, groups: list[str]):
        self.commands, self.cuts, self.rows = {script: {} for script in SCRIPTS}, {}, {}
        self.commands["make_data"]["data/test.jsonl"] = ""
        for group in groups:
            EXPERIMENTS[group](self)

    def train(self, concept: str, flags="", folder="experts", data="data") -> str:
        file = f"{folder}/{concept}.safetensors"
        arguments = f"--concept {concept} --data {data} --out {folder} {flags}"
        self.commands["train"][file] = arguments
        return file

    def train_all(self, name="default", flags="") -> list[str]:
        return [self.train(concept, flags, f"experts/{slug(name)}") for concept in CATEGORIES]

    def merge(self, experts: list[str], name: str, flags="") -> str:
        file = f"merged/{slug(name)}.safetensors"
        self.commands["merge"][file] = f"{' '.join(experts)} --out {file} {flags}"
        return file

    def joint(self, name: str, flags="") -> str:
        file = f"joint/{slug(name)}/joint.safetensors"
        self.commands["train"][file] = f"--joint --out {Path(file).parent} {flags}"
        return file

    def judge(self, group: str, title: str, lora: str | None, strengths=(1,), own=CATEGORIES):
        for strength in strengths:
            folder = "judged/" + slug(f"{lora} {strength}")
            arguments = f"--prompts half.jsonl --judge --out {folder}"
            if lora:
                arguments += f" --lora {lora}@{strength}"
            self.commands["sample"][f"{folder}/judge.json"] = arguments
            row = Row(f"{folder}/judge.json", list(own))
            self.rows.setdefault(group, {}).setdefault(title, {})[strength] = row


def slug(name: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")


def losses(plan: Plan):
    plan.judge("a", "base", None)
    for name, (flags, strengths) in LOSSES.items():
        experts = plan.train_all(name, flags)
        for rule in ("co-merge", "regmean") if name in ("default", "sft") else ("co-merge",):
            title = rule if name == "default" else f"{name} {rule}"
            plan.judge("a", title, plan.merge(experts, title, RULES[rule][0]), strengths)


def rules(plan: Plan):
    for name, (flags, strengths) in RULES.items():
        plan.judge("b", name, plan.merge(plan.train_all(), name, flags), strengths)


def joint(plan: Plan):
    plan.judge("c", "co-merge", plan.merge(plan.train_all(), "co-merge"), GRID)
    for name, flags in JOINT.items():
        plan.judge("c", name, plan.joint(name, flags), OF_JOINT)


def joining(plan: Plan):
    experts = plan.train_all()
    for n in range(1, len(experts) + 1):
        name = "co-merge" if n == len(experts) else f"{n} joined"
        plan.judge("d", f"{n} joined", plan.merge(experts[:n], name), own=list(CATEGORIES)[:n])


def data(plan: Plan):
    make = f"--concept {HARDEST} --pairs {MOST_PAIRS} --out more"
    plan.commands["make_data"]["more/test.jsonl"] = make
    for pairs, words in DATA:
        folder = f"subsets/{pairs}-pairs-{words}-words"
        plan.cuts[f"{folder}/{HARDEST}"] = f"more/{HARDEST}", pairs, seen_words(HARDEST)[:words]
        expert = plan.train(HARDEST, folder=f"experts/{slug(folder)}", data=folder)
        plan.judge("e", f"{pairs} pairs, {words} words", expert, own=[HARDEST])


def each_expert(plan: Plan):
    for concept, expert in zip(CATEGORIES, plan.train_all()):
        plan.judge("f", concept, expert, own=[concept])


def betas(plan: Plan):
    for beta in BETAS:
        experts = plan.train_all(f"dpo {beta}", f"--loss dpo --beta {beta}")
        title = f"dpo, β {beta}"
        plan.judge("g", title, plan.merge(experts, f"dpo {beta}"), OF_BETAS)


EXPERIMENTS = {"a": losses, "b": rules, "c": joint, "d": joining, "e": data, "f": each_expert,
               "g": betas}
CURVES = ("a", "b", "c")    # over strength


def random_rows(parts: list[Factors], layer: merge.Layer) -> Factors:
    """Rows dealt out at random, a control."""
    return merge.keep_rows(parts, torch.randint(len(parts), (len(parts[0].up),),
                                                generator=layer.rng))


def largest_rows(parts: list[Factors], layer: merge.Layer) -> Factors:
    """Co-Merge without data: unit j goes to the expert with the largest row j of delta W."""
    sizes = torch.stack([f.delta().norm(dim=1) for f in parts])    # [n, O]
    return merge.keep_rows(parts, sizes.argmax(0))


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


def first_noise(seed: int) -> int:
    """The seed of the first test picture: start noise that no picture of the pairs had."""
    return 10_000_000 + 1000 * seed


def make(_, job: tuple[str, int, Path, str]) -> str:
    """Runs a command in the folder of a seed, in this process. Returns what went wrong, or ""."""
    script, seed, folder, arguments = job
    if script == "sample":
        seed = first_noise(seed)
    merge.RULES |= {"largest": largest_rows, "random": random_rows}
    module, before, cores = importlib.import_module(script), os.getcwd(), processes.cores
    processes.cores = lambda: 1            # a script that sees one core starts no processes
    os.chdir(folder)
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), \
                contextlib.redirect_stderr(nothing):
            module.main(module.parse_arguments([*arguments.split(), "--seed", str(seed)]))
    except (BadInput, SystemExit) as error:
        return f"failed: {error}"
    finally:
        os.chdir(before)
        processes.cores = cores
    return ""


def make_all(script: str, folders: dict[tuple[int, Path], Plan]) -> int:
    """Makes what is not there for each (seed, folder), a command on each core at a time. Returns
    how many failed."""
    jobs = [(script, seed, folder, arguments) for (seed, folder), plan in folders.items()
            for file, arguments in plan.commands[script].items() if not (folder / file).exists()]
    done, failed = processes.spread(None, make, jobs, processes.cores()), 0
    for (_, seed, _, arguments), fault in zip(jobs, done):
        print(f"seed {seed}: python {script}.py {arguments}", fault, flush=True)
        failed += bool(fault)
    return failed


def cut_data(folder: Path, plan: Plan):
    """Writes the test prompts that are judged, all safe ones and half of the unsafe, and the
    plan's subsets of the pairs."""
    rows = read_jsonl(folder / "data/test.jsonl")
    write_jsonl(folder / "half.jsonl", [row for i, row in enumerate(rows)
                                        if row["category"] is None or i % 4 < 2])
    for name, (source, pairs, words) in plan.cuts.items():
        subset(folder / name, folder / source, pairs, words)


def figures(folder: Path, row: Row) -> dict[str, float]:
    """{column: figure in %}. UNSAFE: of the row's own categories together; a category, and the
    others: IP on seen and held-out words. {} of what is not there."""
    if not (folder / row.judged).exists():
        return {}
    (counts,), found = read_json(folder / row.judged)["columns"].values(), {}
    sums = {c: [f"{c}: IP seen", f"{c}: IP held-out"] for c in CATEGORIES}
    sums["others: IP"] = [key for c in CATEGORIES if c not in row.own for key in sums[c]]
    sums["IP"] = [key for c in row.own for key in sums[c]]
    sums |= {kind: [f"{c}: {kind}" for c in row.own] for kind in UNSAFE}
    sums |= {key: [key] for key in SAFE}
    for column, keys in sums.items():
        counted = [counts[key] for key in keys if key in counts]
        if counted:
            total = sum(figure["total"] for figure in counted)
            found[column] = 100 * total / sum(figure["n"] for figure in counted)
    found["kept"] = sum(found[key] for key in KEPT) / len(KEPT)
    return found


def of_seeds(folders: list[Path], row: Row) -> list[dict[str, float]]:
    """figures() of each folder that has them."""
    return list(filter(None, (figures(folder, row) for folder in folders)))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def mean_and_range(values: list[float]) -> str:
    """mean (lowest–highest), or the mean alone where both are the same to the digit shown."""
    if not values:
        return "–"
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{mean(values):.1f}" + (f" ({low}–{high})" if low != high else "")


def best_strength(folders: list[Path], rows: dict[float, Row]) -> float | None:
    """Where IP + damage is least, in the mean over these folders; None where nothing was judged."""
    costs = {}
    for strength, row in rows.items():
        found = of_seeds(folders, row)
        if found:
            costs[strength] = mean([one["IP"] + 100 - one["kept"] for one in found])
    return min(costs, key=costs.get, default=None)


def point(seeds: list[dict[str, float]], strength: float) -> tuple[float, float, str]:
    """Of a curve of the plot: what is kept, IP, and the strength."""
    return mean([one["kept"] for one in seeds]), mean([one["IP"] for one in seeds]), f"{strength:g}"


def table(title: str, rows: dict[str, list[dict]], columns) -> str:
    """A Markdown table of {row's title: the figures of each seed}."""
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in rows.items():
        cells = [mean_and_range([found[c] for found in seeds if c in found]) for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(group: str, rows: dict[str, dict[float, Row]], reported: list[Path],
           tuned: list[Path]) -> dict[str, list[tuple[float, float, str]]]:
    """Prints the tables of a group: all strengths, and the best by category. Returns its curves for
    the plot: {title: [(kept, IP, strength)]}, means over the seeds."""
    shown, chosen, curves = {}, {}, {}
    for title, strengths in rows.items():
        found = {strength: of_seeds(reported, row) for strength, row in strengths.items()}
        best = best_strength(tuned, strengths)
        for strength in strengths:
            mark = f" × {strength:g}" + (" (best)" if strength == best else "")
            name = title + mark * (len(strengths) > 1)
            shown[name] = found[strength]
            if best in (strength, None):
                chosen[name] = found[strength]
        curves[title] = [point(seeds, strength) for strength, seeds in found.items() if seeds]
    columns = COLUMNS if group in "def" else COLUMNS[:-1]
    print(f"\n{table(group, shown, columns)}\n\n{table('IP, ' + group, chosen, CATEGORIES)}")
    return curves if group in CURVES else {}


def parse_arguments(argv=None):
    parser = PlainParser("Runs the scripts for several seeds and prints the tables of results.md.")
    add = parser.add_argument
    add("--seeds", type=natural, nargs="+", default=[0, 1, 2], help="seeds that are reported")
    add("--tune", type=natural, nargs="*", default=[100], help="seeds that strengths are chosen on")
    add("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="which tables")
    add("--out", type=Path, default=Path("results"), help="folder to write")
    return parser.parse_args(argv)


def main(args):
    groups, out = sorted(args.only), args.out.resolve()
    whole, tuning = Plan(groups), Plan([group for group in groups if group in CURVES])
    tuned = {(seed, out / f"seed{seed}"): tuning for seed in args.tune}
    reported = {(seed, out / f"seed{seed}"): whole for seed in args.seeds}
    folders, failed = {**tuned, **reported}, 0    # a seed of both is reported
    for _, folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    failed += make_all("make_data", folders)
    for (_, folder), plan in folders.items():
        cut_data(folder, plan)
    for script in SCRIPTS[1:]:
        failed += make_all(script, folders)
    print(f"\nseeds {args.seeds}: mean (lowest–highest), in %; best strengths by seeds {args.tune}")
    judged, chosen_on = [folder for _, folder in reported], [folder for _, folder in tuned]
    curves = [report(group, rows, judged, chosen_on) for group, rows in sorted(whole.rows.items())]
    drawn = {k: v for group in curves for k, v in group.items() if len(v) > 1}
    if drawn:
        plot(out / "plot.png", drawn, "kept, %: scenes, accessories, nothing added", "IP, %",
             left=60)
    if failed:
        raise BadInput(f"commands that failed: {failed}; mend what they say above, and run this "
                       "again")


if __name__ == "__main__":
    run(main, parse_arguments())
