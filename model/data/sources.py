"""Where prompts come from: the toy's grammar, files, or a language model. Each gives a Source.

Needs:       what language_model.py needs; of the toy its grammar alone.
Gives:       source_of() for make_data.py; from_grammar(), from_files(), from_language_model();
             readable(); write_tests(); requests_of() for sample.py.
"""
import sys
import zlib
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from model.data.language_model import LanguageModel, read_concepts, write_pairs
from model.data.prompt_files import Pair, Request, read_prompts, read_requests, split
from model.formats.checkpoint import Checkpoint
from model.text import Tokenizers
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


def chosen(concept: str, names, where) -> list[str]:
    """The names that --concept means. Raises BadInput if there are none."""
    names = list(dict.fromkeys(names))
    if concept not in ("all", *names):
        raise BadInput(f"--concept {concept}: is not in {where}; use all or one of "
                       + ", ".join(names))
    return names if concept == "all" else [concept]


def from_grammar(concept: str, pairs: int | None, seed: int) -> Source:
    """Pairs of the toy world, 160 a concept unless said; two concepts' seeds are 100,000 apart."""
    concepts, rows = list(world.CATEGORIES), {}
    for name in chosen(concept, concepts, "the toy's grammar"):
        first = (seed + concepts.index(name) + 1) * 100_000
        prompts = world.training_pairs(name, pairs or 160, seed)
        rows[name] = [{"unsafe": unsafe, "safe": safe, "seed": first + i}
                      for i, (unsafe, safe) in enumerate(prompts)]
    return Source(rows, world.test_prompts(seed), [])


def from_files(files: list[Path], images: Path | None, out: Path, concept: str, pairs: int | None,
               seed: int) -> Source:
    """The pairs of all files, at most `pairs` a concept, in the files' order. Test prompts that are
    trained on are left out: by these pairs or, without any, by those in `out`. Raises BadInput."""
    found = [read_prompts(file, images, None if concept == "all" else concept) for file in files]
    notes = ["\n  ".join([f"{file}:", *prompts.report()]) for file, prompts in zip(files, found)]
    everything = [pair for prompts in found for pair in prompts.pairs]
    given, rows = defaultdict(set), Counter()
    for prompts in found:
        rows += prompts.test_rows
        for prompt, categories in prompts.tests.items():
            given[prompt] |= categories
    training, tests = split(everything, given, seed)
    if not everything:
        for row in chain(*map(read_jsonl, out.glob("*/pairs.jsonl"))):
            for side in ("unsafe", "safe"):
                tests.pop(str(row.get(side)), None)
    about = (f"{len(everything) - len(training):,} pairs held out: a tenth of each category, none "
             "of fewer than 10 prompts")
    if given:
        repeats = rows.total() - sum(rows[prompt] for prompt in tests.keys() & rows)
        about = f"{repeats:,} rows left out, which repeat a training prompt; " + about
    notes.append(f"test: {len(tests):,} prompts; {about}")
    test_rows = [{"prompt": prompt, "category": category} for prompt, categories in tests.items()
                 for category in sorted(categories) or [None]]
    return Source(rows_of(training, concept, pairs, seed), test_rows, notes)


def rows_of(training: list[Pair], concept: str, pairs: int | None, seed: int):
    """{concept: rows}. A pair of two categories has its row in both. A row's seed comes from the
    row alone, whatever else is in the file."""
    rows = defaultdict(list)
    for pair in training:
        row = {side: pair.prompts[side] for side in ("unsafe", "safe")}
        if pair.images:
            row["sources"] = (pair.images["safe"], pair.images["unsafe"])
        else:
            row["seed"] = zlib.crc32(f"{seed} {pair.key}".encode())
        for category in pair.categories:
            rows[category].append(row)
    names = chosen(concept, sorted(rows), "the files") if rows else []
    return {name: rows[name][:pairs] for name in names}


def from_language_model(folder: Path, concepts: Path, out: Path, concept: str, pairs: int | None,
                        seed: int, device: torch.device) -> Source:
    """The pairs that the language model in `folder` writes, 32 an entry of the list unless said.

    Entry i is out/_written/<i>.json; what is there is done, and processes share the entries. All of
    them together are out/prompts.jsonl, which is read like any other file. Raises BadInput.
    """
    entries, count = read_concepts(concepts), pairs or 32
    names = chosen(concept, (category for category, _ in entries), concepts)
    written = out / "_written"    # a category's folder never has an underscore
    files = {written / f"{i:05d}.json": entry
             for i, entry in enumerate(entries) if entry[0] in names}
    if not any(folder.glob("*.safetensors")):
        raise BadInput(f"--llm {folder}: no such folder, or no .safetensors in it; give a causal "
                       "language model with its tokenizer, in safetensors form")
    if processes.RANK == 0:
        parts = sorted(folder.glob("*.[js]*"))    # .json, .jinja and .safetensors
        prepare(written, {"language model": sha256(*parts), "concepts": sha256(concepts),
                          "pairs": count, "seed": seed}, ("[0-9]*.json",))
    processes.wait()
    todo = [file for file in list(files)[processes.RANK::processes.WORLD] if not file.exists()]
    model = LanguageModel(folder, device) if todo else None
    for file in tqdm(todo, desc="writing prompts", unit="concept", disable=processes.RANK > 0):
        own_seed = zlib.crc32(f"{seed} {files[file]}".encode())
        rows, counts = write_pairs(model, *files[file], count, own_seed)
        write_json(file, {"rows": rows, "counts": counts})
    processes.wait()
    records = [read_json(file) for file in files]
    rows = [row for record in records for row in record["rows"]]
    counts = sum((Counter(record["counts"]) for record in records), Counter())
    summary = f"{folder}: {len(rows):,} of {count * len(files):,} pairs written; " + ", ".join(
        f"{n:,} {what}" for what, n in sorted(counts.items()))
    if not rows:
        raise BadInput(f"--llm {summary}; use a model that follows instructions")
    write_jsonl(out / "prompts.jsonl", rows)    # every process: the same bytes, moved into place
    source = from_files([out / "prompts.jsonl"], None, out, concept, None, seed)
    return source._replace(notes=[summary, *source.notes])


def readable(source: Source, tokenizers: Tokenizers) -> Source:
    """Without the pairs whose two prompts are one to the model: they differ beyond what it reads,
    and would train nothing. Notes say how many these are, and how many prompts are cut. Raises
    BadInput for a concept that has no other pairs."""
    rows, notes, prompts = {}, list(source.notes), []
    for concept, pairs in source.rows.items():
        sides = [[row[side] for row in pairs] for side in ("unsafe", "safe")]
        unsafe, safe = map(tokenizers.tokenize, sides)    # ids [P, L]
        rows[concept] = [row for row, same in zip(pairs, (unsafe == safe).all(1)) if not same]
        if len(rows[concept]) < len(pairs):
            notes.append(f"{concept}: {len(pairs) - len(rows[concept]):,} of {len(pairs):,} pairs "
                         f"dropped, whose prompts are one to the model: it reads "
                         f"{tokenizers.length} tokens")
        if not rows[concept]:
            raise BadInput(f"{notes[-1]}; put what differs at the prompts' start")
        prompts += chain(*sides)
    notes.append(tokenizers.cut(prompts))
    return source._replace(rows=rows, notes=list(filter(None, notes)))


def source_of(model: Path, concept: str, pairs: int | None, seed: int, prompts: list[Path] | None,
              images: Path | None, llm: Path | None, concepts: Path | None, out: Path,
              device: torch.device) -> Source:
    """The prompts, from wherever make_data.py's flags of these names say, as `model` reads them.
    Raises BadInput if the flags contradict each other."""
    if (llm is None) != (concepts is None) or (llm and prompts):
        raise BadInput("--llm needs --concepts, and excludes --prompts; give --llm DIR --concepts "
                       "FILE")
    if images and not (prompts and images.is_dir()):
        raise BadInput(f"--images {images}: needs to be a folder, and --prompts FILE, which "
                       "says what its pictures show; give both")
    if llm:
        source = from_language_model(llm, concepts, out, concept, pairs, seed, device)
    elif prompts:
        source = from_files(prompts, images, out, concept, pairs, seed)
    else:
        source = from_grammar(concept, pairs, seed)
    return readable(source, Tokenizers.of(Checkpoint(model)))


def write_tests(out: Path, source: Source):
    """The test prompts: of all concepts, and for each its own unsafe ones and the safe ones."""
    write_jsonl(out / "test.jsonl", source.tests)
    for concept in source.rows or {row["category"] for row in source.tests} - {None}:
        rows = [row for row in source.tests if row["category"] in (concept, None)]
        write_jsonl(out / concept / "test.jsonl", rows)


def requests_of(prompts: list[str], file: Path | None, model: Path) -> list[Request]:
    """For sample.py: those of the command line, and then those of the file. What a count of them
    would not show is said on stderr. Raises BadInput if there are none."""
    requests, notes = read_requests(file) if file else ([], [])
    requests = [Request(prompt) for prompt in prompts] + requests
    if not requests:
        raise BadInput("nothing to generate; give a prompt in quotes, or --prompts FILE with a "
                       "prompt in it")
    notes.append(Tokenizers.of(Checkpoint(model)).cut([request.prompt for request in requests]))
    for note in filter(None, notes):
        print(f"note: {note}", file=sys.stderr)
    return requests
