"""Prompts from files: CSV or JSON lines -> preference pairs and test prompts. It reads; it draws and writes nothing.

What it is:  the reader of the published CoProV2 files, of the Hugging Face form and of files of one's own, and
             the split into what is trained on and what is tested on.
Needs:       nothing but Python.
Gives:       for make_data.py: read_prompts() -> Prompts, Prompts.report(), split(), canonical(), inside(); for sample.py:
             read_requests() -> [Request].

A row is known by its columns, in a CSV file with a header and in JSON lines alike:

    CoProV2       prompt, image, category          u_idx_0000012_0.jpg and s_idx_0000012_0.jpg are ONE pair, wherever
                                                   they stand; 0000012_0.jpg is an unsafe prompt of the test split
    Hugging Face  jpg_0, jpg_1, label_0, caption   label_0 1: jpg_0 is the preferred (safe) picture, 0: jpg_1 is;
                                                   safe: the safe prompt, if there is one
    ours          unsafe, safe                     safe_image, unsafe_image: pictures that exist already
    test          prompt                           a prompt to test on; category null: a safe one
    I2P           prompt, categories, sd_seed, sd_guidance_scale, ...    sample.py alone: categories are separated by commas;
                                                   ESD's evaluation_seed and evaluation_guidance, and plain seed and
                                                   guidance (as in the index.jsonl that sample.py writes), count as well

Where a row has no category, it is the one that --concept gives; in JSON it may be a list of names.
"""
import csv
import json
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .files import BadInput

PUBLISHED = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal-activity")
TYPOS = {"harrasment": "harassment"}                              # as CoProV2 spells it
SEEDS, GUIDANCES = ("sd_seed", "evaluation_seed", "seed"), ("sd_guidance_scale", "evaluation_guidance", "guidance")
IMAGE = re.compile(r"(?:.*/)?(?:([us])_idx_)?(\d+_\d+)\.\w+")     # [u or s, neither in the test split], index


class Refused(ValueError):
    """Why a row cannot be used. The same words for the same fault, so that rows can be counted by it."""


@dataclass
class Pair:
    """One preference pair. key: what tells it from the others of all files, its index or its texts. images: (safe,
    unsafe), where they are read and not drawn. category is a SET: one pair may stand for several harms."""
    key: str
    unsafe: str
    safe: str
    images: tuple[Path, Path] | None
    categories: set[str]


@dataclass
class Prompts:
    """What a file holds. tests: prompt -> its categories, none for a safe prompt; test_rows: prompt -> rows that have it.
    repeats: rows of pairs that say nothing new. refused: why -> line numbers, from 1."""
    pairs: list[Pair] = field(default_factory=list)
    tests: dict[str, set[str]] = field(default_factory=dict)
    test_rows: Counter = field(default_factory=Counter)
    repeats: int = 0
    refused: dict[str, list[int]] = field(default_factory=dict)

    def report(self) -> list[str]:
        """Lines that say what was read, for people."""
        lines = []
        if self.pairs:
            counts = Counter(c for pair in self.pairs for c in pair.categories)
            lines += [f"{len(self.pairs):,} pairs / {sum(counts.values()):,} (pair, category) entries: "
                      + ", ".join(f"{c} {n:,}" for c, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
                      f"{sum(len(pair.categories) > 1 for pair in self.pairs):,} pairs in more than one category, {self.repeats:,} repeated rows"]
        if self.tests:
            lines.append(f"{self.test_rows.total():,} test prompts, {self.test_rows.total() - len(self.tests):,} of them repeat another")
        lines += [f"refused {len(where):,}: {why}; line {', '.join(map(str, sorted(where)))}" for why, where in self.refused.items()]
        return lines


def canonical(name: str) -> str:
    """A category's name as a folder's: "Illegal Activity" -> "illegal-activity". Raises Refused if nothing is left."""
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug:
        raise Refused(f"category {name!r} has no letter or digit")
    return TYPOS.get(slug, slug)


def inside(folder: Path, name: str) -> Path:
    """folder/name, followed through links. Raises Refused unless it is a file and, at the end of all links, still in the
    folder: a file from elsewhere must not make us read /etc/passwd or a neighbour's pictures."""
    try:
        path, root = (folder / name).resolve(), folder.resolve()
        there = path.is_file()
    except (ValueError, OSError, RuntimeError):  # a zero byte, a name too long, links in a circle
        raise Refused("a picture's path is not a path") from None
    if Path(name).is_absolute() or not path.is_relative_to(root):
        raise Refused("a picture's path leaves the folder of --images")
    if not there:
        raise Refused("a picture is not in the folder of --images")
    return path


def records(path: Path):
    """Yields (line number of the row's start, {column: value}), or instead of the columns a text: why it is no row.
    Raises BadInput where the file as a whole is neither CSV nor JSON lines, or not in UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            json_lines = file.read(4096).lstrip().startswith("{")
            file.seek(0)
            if json_lines:
                for number, line in enumerate(file, 1):
                    try:
                        row = json.loads(line) if line.strip() else None
                        yield number, row if isinstance(row, (dict, type(None))) else "not a JSON object"
                    except (ValueError, RecursionError):
                        yield number, "not a JSON object"
                return
            reader = csv.reader(file)  # knows quotes that are doubled, and line ends and commas inside quotes
            header = [name.strip() for name in next(reader, [])]
            while (number := reader.line_num + 1) and (row := next(reader, None)) is not None:
                yield number, dict(zip(header, row)) if len(row) == len(header) else row and f"not {len(header)} fields, as in the header"
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not in UTF-8 ({error}); --prompts takes CSV and JSON lines, saved as UTF-8") from None
    except csv.Error as error:
        raise BadInput(f"{path}: not CSV ({error}); is a quote never closed?") from None


def _text(row: dict, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise Refused(f"no {column}")
    if any("\ud800" <= c <= "\udfff" for c in value):  # half a character: no tokenizer and no file can take it
        raise Refused(f"{column} is not valid text")
    return value


def _categories(row: dict, default: str | None) -> set[str]:
    value = row.get("category") or default
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise Refused("no category; add one, or give --concept")
    return {canonical(name) for name in names}


def read_prompts(path: Path, images: Path | None = None, default: str | None = None) -> Prompts:
    """Reads one file. images: the folder of the pairs' pictures, if they exist; default: the category of rows that name
    none. Raises BadInput if the file is missing or not one row of it can be used."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; --prompts takes CSV and JSON lines")
    found, halves, pairs = Prompts(), {}, {}

    def picture(name):
        return inside(images, name) if images else None

    def add(key, unsafe, safe, pictures, categories):
        pair = pairs.setdefault(key, Pair(key, unsafe, safe, pictures if images else None, set()))
        found.repeats += categories <= pair.categories
        pair.categories |= categories

    def add_test(prompt, categories):
        found.tests.setdefault(prompt, set()).update(categories)
        found.test_rows[prompt] += 1

    def read(line, row):
        if "jpg_0" in row and "label_0" in row:
            names = [_text(row, "jpg_0"), _text(row, "jpg_1")]
            if str(row["label_0"]) not in ("1", "1.0", "True", "0", "0.0", "False"):
                raise Refused("label_0 is neither 1 nor 0: no preference")
            if str(row["label_0"]) in ("0", "0.0", "False"):
                names.reverse()
            if not images and not row.get("safe"):
                raise Refused("a Hugging Face row has no safe prompt to draw; give --images")
            # Without a safe prompt it is the empty one: train.py then keeps what the model draws unprompted.
            caption, safe = _text(row, "caption"), _text(row, "safe") if row.get("safe") else ""
            add(json.dumps([caption, safe, *names]), caption, safe, tuple(map(picture, names)), _categories(row, default))
        elif "unsafe" in row:
            texts = [_text(row, column) for column in (("unsafe", "safe", "safe_image", "unsafe_image") if images else ("unsafe", "safe"))]
            add(json.dumps(texts), *texts[:2], tuple(map(picture, texts[2:])), _categories(row, default))
        elif "image" in row:
            name, prompt, categories = _text(row, "image"), _text(row, "prompt"), _categories(row, default)
            match = IMAGE.fullmatch(name)
            if not categories <= set(PUBLISHED):
                raise Refused(f"category {row.get('category') or default!r} is none of CoProV2's")
            if not match:
                raise Refused("image is no name of CoProV2 (u_idx_0000000_0.jpg, s_idx_0000000_0.jpg or 0000000_0.jpg)")
            if not match[1]:
                return add_test(prompt, categories)
            new = {"prompt": prompt, "picture": picture(name), "line": line, "categories": set()}
            half = halves.setdefault(match[2], {}).setdefault(match[1], new)
            if half["prompt"].casefold().split() != prompt.casefold().split():  # spaces and case are no contradiction
                raise Refused("the same index and kind as a row above, with another prompt")
            found.repeats += categories <= half["categories"]
            half["categories"] |= categories
        elif "prompt" in row:
            add_test(_text(row, "prompt"), _categories(row, default) if row.get("category") or default else set())
        else:
            raise Refused("none of the known columns (prompt, image, category; jpg_0, jpg_1, label_0, caption; unsafe, safe; prompt)")

    for line, row in records(path):
        try:
            if isinstance(row, str):
                raise Refused(row)
            if row:
                read(line, row)
        except Refused as why:
            found.refused.setdefault(str(why), []).append(line)
    for index, half in halves.items():
        if len(half) == 2:
            u, s = half["u"], half["s"]
            pairs[index] = Pair(index, u["prompt"], s["prompt"], (s["picture"], u["picture"]) if images else None, u["categories"] | s["categories"])
        else:
            found.refused.setdefault("the pair's other half is missing or refused", []).append(next(iter(half.values()))["line"])
    found.pairs = list(pairs.values())
    if not found.pairs and not found.tests:
        why, where = next(iter(found.refused.items()), ("it is empty", [1]))
        raise BadInput(f"{path}: no row can be used; line {where[0]}: {why}")
    return found


@dataclass
class Request:
    """A prompt to draw. categories: empty for a safe prompt, None where nobody said. seed, guidance: its own, if any."""
    prompt: str
    categories: set[str] | None = None
    seed: int | None = None
    guidance: float | None = None


def _number(row: dict, columns: tuple[str, ...], kind):
    """The value, int (a seed) or float, of the first of the columns that the row fills; None if it fills none."""
    name = next((column for column in columns if row.get(column) not in (None, "")), None)
    try:
        value = kind(str(row[name]).strip().removesuffix(".0")) if name else None
        if value is not None and not (math.isfinite(value) if kind is float else 0 <= value < 2 ** 63):
            raise ValueError
        return value
    except ValueError:
        raise Refused(f"{name} {row[name]!r} is no {'whole number from 0' if kind is int else 'finite number'}") from None


def read_requests(path: Path) -> list[Request]:
    """The prompts of a file in its order, with their categories, seeds and guidance. In CSV, a row that repeats prompt, seed
    and guidance of another only adds its category: so do the published files name several. Raises BadInput, naming the
    line, for a row without a prompt or with a value that is none."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; python make_data.py writes data/test.jsonl")
    with open(path, encoding="utf-8", errors="replace") as file:
        table = not file.read(4096).lstrip("\ufeff \n").startswith("{")
    requests, first = [], {}
    for line, row in records(path):
        try:
            if isinstance(row, str):
                raise Refused(row)
            if not row:
                continue
            column = next((c for c in ("category", "categories") if c in row), None)
            names = row.get(column) or []
            names = names.split(",") if isinstance(names, str) else names
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise Refused(f"{column} {names!r} is no category and no list of them")
            if isinstance(row.get("image"), str) and (match := IMAGE.fullmatch(row["image"])) and match[1] == "s":
                names = []                     # the safe half of a CoProV2 pair carries the category that it is safe from
            request = Request(_text(row, "prompt"), {canonical(name) for name in names if name.strip()} if column else None,
                              _number(row, SEEDS, int), _number(row, GUIDANCES, float))
        except Refused as why:
            raise BadInput(f"{path} line {line}: {why}; correct the line or leave it out") from None
        same = first.setdefault((request.prompt, request.seed, request.guidance), request)
        if table and same is not request:
            same.categories = (same.categories or set()) | (request.categories or set()) if column else None
        else:
            requests.append(request)
    return requests


def split(pairs: list[Pair], tests: dict[str, set[str]], seed: int) -> tuple[list[Pair], dict[str, set[str]]]:
    """(the pairs to train on, {prompt to test on: categories}), which share no prompt.

    Where a file gave test prompts, all pairs are trained on. Else a tenth of each category's unsafe prompts is held out,
    chosen by a hash, so that the choice does not depend on the order of the rows, and a prompt that occurs twice is
    on one side; the held-out pairs' safe prompts are tested on as well, as safe ones.
    """
    if not tests:
        held, tests = set(), {}
        for category in sorted({c for pair in pairs for c in pair.categories}):
            prompts = sorted({pair.unsafe for pair in pairs if category in pair.categories},
                             key=lambda prompt: (zlib.crc32(f"{seed} {prompt}".encode()), prompt))
            held.update(prompts[:len(prompts) // 10])
        for pair in pairs:
            if pair.unsafe in held:
                tests.setdefault(pair.unsafe, set()).update(pair.categories)
        tests |= {pair.safe: set() for pair in pairs if pair.unsafe in held and pair.safe and pair.safe not in tests}
        pairs = [pair for pair in pairs if pair.unsafe not in held]
    seen = {prompt for pair in pairs for prompt in (pair.unsafe, pair.safe)}
    return pairs, {prompt: categories for prompt, categories in tests.items() if prompt not in seen}
