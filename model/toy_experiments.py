"""The tables of the README, from the four scripts: `python -m model.toy_experiments --seeds 0 1 2`

What it is:  a driver that runs the scripts as a person would, for several seeds (a seed moves everything:
             prompts, pictures, experts, test prompts), and prints mean and range over the seeds.
Needs:       the embedded toy; about 15 minutes a seed on 2 CPU cores.
Gives:       results/seed<k>/ with all files, and two tables on stdout: the experts, and the merging methods.
             What is already there is not run again.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

from .toy_world import CATEGORIES

# name: (merge.py's flags, strengths). Each at strength 1 and around its own best, so that trade-offs are compared and
# not scales. (average is sum at another strength: 1/7, 2/7, ...)
METHODS = {
    "co-merge": (("--method", "co-merge"), (1, 0.8, 1.2)),
    "co-merge, not rescaled": (("--method", "co-merge", "--no-rescale"), (1, 1.5, 1.8)),
    "co-merge by wins": (("--method", "co-merge", "--score", "wins"), (1, 0.8, 1.2)),
    "average": (("--method", "average"), (1,)),
    "sum": (("--method", "sum"), (1, 0.35, 0.4, 0.45)),
    "random rows": (("--method", "random"), (1, 2, 2.5)),
    "joint": (None, (1, 0.8, 1.2)),     # one LoRA on all the data, by train.py --joint
}
COLUMNS = ("all: IP seen", "all: IP held-out", "all: scene", "safe: scene", "safe: accessory", "safe: nothing added", "safe: IP")


def script(name: str, *arguments):
    print("+ python", name, *arguments, flush=True)
    subprocess.run([sys.executable, name, *map(str, arguments)], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def judged(out: Path, prompts: Path, seed: int, *loras: str) -> dict:
    """{column: share in %} of one model on the prompts, by sample.py --judge."""
    if not (out / "judge.json").exists():
        script("sample.py", "--prompts", prompts, "--judge", "--out", out, "--seed", 10_000_000 + 1000 * seed,
               *(["--lora", *loras] if loras else []))
    (tally,) = json.loads((out / "judge.json").read_text())["columns"].values()
    return {key: 100 * hits / n for key, (hits, n) in tally.items()}


def run_seed(folder: Path, seed: int) -> tuple[dict, dict]:
    """Runs the whole story for one seed. Returns ({concept: (base, expert)}, {method@strength: figures})."""
    data, experts, test = folder / "data", folder / "experts", folder / "data/test.jsonl"
    if not test.exists():
        script("make_data.py", "--out", data, "--seed", seed)
    if len(list(experts.glob("*.safetensors"))) < len(CATEGORIES):
        script("train.py", "--data", data, "--out", experts, "--seed", seed)
    if not (folder / "joint.safetensors").exists():
        script("train.py", "--joint", "--data", data, "--out", folder, "--seed", seed)

    own = {c: tuple(judged(folder / f"judged/{c}-{kind}", data / c / "test.jsonl", seed, *lora)
                    for kind, lora in (("base", ()), ("expert", (f"{experts / c}.safetensors",)))) for c in CATEGORIES}
    merged = {"base": judged(folder / "judged/base", test, seed)}
    for name, (flags, strengths) in METHODS.items():
        file = folder / f"{name.replace(',', '').replace(' ', '-')}.safetensors"
        if not file.exists():
            script("merge.py", experts, *flags, "--data", data, "--out", file, "--seed", seed)
        for s in strengths:
            merged[f"{name} x {s}"] = judged(folder / f"judged/{file.stem}-{s}", test, seed, f"{file}@{s}")
    return own, merged


def spread(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{sum(values) / len(values):.1f}" + (f" ({low}–{high})" if low != high else "")


def table(title: str, rows: dict[str, list[dict]], columns):
    print(f"\n| {title} | " + " | ".join(c.replace("all: ", "") for c in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, figures in rows.items():
        print(f"| {name} | " + " | ".join(spread([f[c] for f in figures]) for c in columns) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the whole story (default: 0 1 2)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write (default: results)")
    args = parser.parse_args()
    results = [run_seed(args.out / f"seed{seed}", seed) for seed in args.seeds]
    print(f"\nseeds {args.seeds}: mean (lowest-highest), in %")
    table("its own category", {f"{c}: {kind}": [own[c][k] for own, _ in results] for c in CATEGORIES
                               for k, kind in enumerate(("base", "expert"))}, COLUMNS)
    table("all categories", {name: [merged[name] for _, merged in results] for name in results[0][1]}, COLUMNS)
