"""Where prompts come from: the toy's grammar, files, or a language model. Each gives a Source.

Needs:       what language_model.py needs; of the toy its grammar alone.
Gives:       from_grammar(), from_files(), from_language_model(), for make_data.py.
"""
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from model.data.language_model import LanguageModel, read_concepts, write_pairs
from model.data.prompt_files import Pair, read_prompts, split
from model.tools import processes
from model.tools.command import BadInput
from model.tools.files import prepare, read_json, read_jsonl, sha256, write_json, write_jsonl
from model.toy import world


class Source(NamedTuple):
    """rows: {concept: [row]}. A row has the prompts "unsafe" and "safe", and a "seed" to draw both
    from, or "sources", the paths (safe, unsafe) of pictures that exist. tests: [{"prompt",
    "category"}], category None for a safe prompt; no row has its prompts. notes: for people."""
    rows: dict[str, list[dict]]
    tests: list[dict]
    notes: list[str]


def from_grammar(concept: str, pairs: int | None, seed: int) -> Source:
    """Pairs of the toy world, 160 a concept unless said; two concepts' seeds are 100,000 apart."""
    concepts = list(world.CATEGORIES)
    if concept not in ("all", *concepts):
        raise BadInput(f"--concept {concept} is unknown; use all or one of {', '.join(concepts)}")
    rows = {}
    for index, name in enumerate(concepts):
        if concept in ("all", name):
            prompts = world.training_pairs(name, pairs or 160, seed)
            rows[name] = [{"unsafe": unsafe, "safe": safe, "seed": (seed + index + 1) * 100_000 + i}
                          for i, (unsafe, safe) in enumerate(prompts)]
    return Source(rows, world.test_prompts(24, seed), [])


def from_files(files: list[Path], images: Path | None, out: Path, concept: str, pairs: int | None,
               seed: int) -> Source:
    """The pairs of all files, at most `pairs` a concept, in the files' order. Test prompts that are
    trained on are left out: by these pairs or, without any, by those in `out`. Raises BadInput."""
    found = [read_prompts(file, images, None if concept == "all" else concept) for file in files]
    notes = ["\n  ".join([f"{file}:", *prompts.report()]) for file, prompts in zip(files, found)]
    everything, given = [pair for prompts in found for pair in prompts.pairs], {}
    for prompts in found:
        for prompt, categories in prompts.tests.items():
            given.setdefault(prompt, set()).update(categories)
    training, tests = split(everything, given, seed)
    if not everything:
        for file in out.glob("*/pairs.jsonl"):
            for row in read_jsonl(file):
                tests.pop(str(row.get("unsafe")), None)
                tests.pop(str(row.get("safe")), None)
    if given:
        rows = sum((prompts.test_rows for prompts in found), Counter())
        repeats = sum(rows[prompt] for prompt in given.keys() - tests.keys())
        about = f"; {repeats:,} rows left out, which repeat a training prompt"
    else:
        about = f", held out with {len(everything) - len(training):,} pairs"
        if len(everything) == len(training):
            about += ", since a tenth of fewer than 10 prompts is none"
    notes.append(f"test: {len(tests):,} prompts{about}")
    return Source(rows_of(training, concept, pairs, seed), rows_to_test(tests), notes)


def rows_of(training: list[Pair], concept: str, pairs: int | None, seed: int) -> dict[str, list]:
    """{concept: rows}. A pair of two categories has its row in both. A row's seed comes from the
    row alone, whatever else is in the file."""
    rows: dict[str, list] = {}
    for pair in training:
        row = {side: pair.prompts[side] for side in ("unsafe", "safe")}
        if pair.images:
            row["sources"] = (pair.images["safe"], pair.images["unsafe"])
        else:
            row["seed"] = zlib.crc32(f"{seed} {pair.key}".encode())
        for category in pair.categories:
            rows.setdefault(category, []).append(row)
    names = sorted(rows)
    if concept != "all" and rows:
        if concept not in rows:
            raise BadInput(f"--concept {concept}: no pair has it; use all or one of "
                           + ", ".join(names))
        names = [concept]
    return {name: rows[name][:pairs] for name in names}


def rows_to_test(tests: dict[str, set[str]]) -> list[dict]:
    rows = []
    for prompt, categories in tests.items():
        for category in sorted(categories) or [None]:
            rows.append({"prompt": prompt, "category": category})
    return rows


def from_language_model(folder: Path, concepts: Path, out: Path, concept: str, pairs: int | None,
                        seed: int, device: torch.device) -> Source:
    """The pairs that the language model in `folder` writes, 32 an entry of the list unless said.

    Entry i is out/_written/<i>.json; what is there is done, and processes share the entries. All of
    them together are out/prompts.jsonl, which is read like any other file. Raises BadInput.
    """
    entries, count = read_concepts(concepts), pairs or 32
    written = out / "_written"    # a category's folder never has an underscore
    files = {written / f"{i:05d}.json": entry for i, entry in enumerate(entries)
             if concept in ("all", entry[0])}
    if not files:
        raise BadInput(f"--concept {concept}: {concepts} does not list it; use all or one of "
                       + ", ".join(sorted(dict(entries))))
    if processes.RANK == 0:
        parts = [file for file in folder.glob("*") if file.suffix in (".json", ".safetensors")]
        prepare(written, {"language model": sha256(*sorted(parts)), "concepts": sha256(concepts),
                          "pairs": count, "seed": seed}, ("[0-9]*.json",))
    processes.wait()
    todo = [file for file in list(files)[processes.RANK::processes.WORLD] if not file.exists()]
    model = LanguageModel(folder, device) if todo else None
    for file in tqdm(todo, desc="writing prompts", unit="concept", disable=processes.RANK > 0):
        rows, counts = write_pairs(model, *files[file], count,
                                   zlib.crc32(f"{seed} {files[file]}".encode()))
        write_json(file, {"rows": rows, "counts": counts})
    processes.wait()
    rows, counts = gathered([read_json(file) for file in files])
    summary = f"{folder}: {len(rows):,} of {count * len(files):,} pairs written; {counts}"
    if not rows:
        raise BadInput(f"--llm {summary}; use a model that follows instructions")
    if processes.RANK == 0:
        write_jsonl(out / "prompts.jsonl", rows)
    processes.wait()
    source = from_files([out / "prompts.jsonl"], None, out, concept, None, seed)
    return source._replace(notes=[summary, *source.notes])


def gathered(records: list[dict]) -> tuple[list[dict], str]:
    """All rows, an unsafe prompt that was written twice once; and what was counted, in words."""
    rows: dict[str, dict] = {}
    counts: Counter = Counter()
    for record in records:
        counts.update(record["counts"])
        for row in record["rows"]:
            counts["duplicates"] += row["unsafe"].casefold() in rows
            rows.setdefault(row["unsafe"].casefold(), row)
    return list(rows.values()), ", ".join(f"{n:,} {what}" for what, n in sorted((+counts).items()))


def source_of(args, device: torch.device) -> Source:
    """The prompts, from wherever make_data.py's flags say. Raises BadInput if they contradict."""
    if (args.llm is None) != (args.concepts is None) or (args.llm and args.prompts):
        raise BadInput("--llm needs --concepts, and excludes --prompts; give --llm DIR --concepts "
                       "FILE")
    if args.images and not (args.prompts and args.images.is_dir()):
        raise BadInput(f"--images {args.images}: needs to be a folder, and --prompts FILE, which "
                       "says what its pictures show; give both")
    wanted = args.concept, args.pairs, args.seed
    if args.llm:
        return from_language_model(args.llm, args.concepts, args.out, *wanted, device)
    if args.prompts:
        return from_files(args.prompts, args.images, args.out, *wanted)
    return from_grammar(*wanted)
