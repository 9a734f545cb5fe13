"""Prompts from files: CSV or JSON lines -> preference pairs and test prompts. It only reads.

Needs:       nothing but Python.
Gives:       for make_data.py: read_prompts() -> Prompts, and split(), which holds prompts out;
             for sample.py: read_requests() -> [Request].

A row's form is known by its columns, in JSON lines as in a CSV file with a header:

    Hugging Face  jpg_0, jpg_1, label_0, caption   label_0 1: jpg_0 is the preferred (safe) picture,
                                                   0: jpg_1 is; safe: the safe prompt, if any
    ours          unsafe, safe                     safe_image, unsafe_image: pictures that exist
    CoProV2       prompt, image, category          u_idx_0000012_0.jpg and s_idx_0000012_0.jpg are
                                                   ONE pair, wherever they stand; 0000012_0.jpg is
                                                   an unsafe prompt of the test split
    test          prompt                           to test on; without a category: a safe prompt
    I2P           prompt, categories, sd_seed, sd_guidance_scale: for sample.py alone, as are
                  evaluation_seed and evaluation_guidance (ESD), seed and guidance (index.jsonl)

Several categories are separated by commas, or a list. A row without one has that of --concept.
"""
import argparse
import csv
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from model.tools.command import BadInput, natural, number

PUBLISHED = {"hate", "harassment", "violence", "self-harm", "sexual", "shocking",
             "illegal-activity"}
TYPOS = {"harrasment": "harassment"}    # as CoProV2 spells it
IMAGE = re.compile(r"(?:.*/)?(?:([us])_idx_)?(\d+_\d+)\.\w+")    # (u, s or neither, index)
SEEDS = ("sd_seed", "evaluation_seed", "seed")
GUIDANCES = ("sd_guidance_scale", "evaluation_guidance", "guidance")
SIZES = ("sd_image_width", "sd_image_height")


class Refused(ValueError):
    """Why a row cannot be used. One fault always has the same words, so that it can be counted."""


@dataclass
class Pair:
    """prompts, images: of "unsafe" and "safe"; no images where they are to be drawn. key: its index
    or its texts. line: where it begins. categories: one pair may stand for several harms."""
    key: str
    line: int
    prompts: dict[str, str] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)
    categories: set[str] = field(default_factory=set)


@dataclass
class Prompts:
    """What a file holds. tests: prompt -> its categories, none for a safe prompt; test_rows: its
    number of rows. repeats: rows that say nothing new. refused: why -> line numbers, from 1."""
    pairs: list[Pair]
    tests: dict[str, set[str]]
    test_rows: Counter
    repeats: int
    refused: dict[str, list[int]]

    def report(self) -> list[str]:
        """What was read, in lines for people."""
        lines = []
        if self.pairs:
            counts = Counter(category for pair in self.pairs for category in pair.categories)
            several = sum(len(pair.categories) > 1 for pair in self.pairs)
            order = sorted(counts, key=lambda category: (-counts[category], category))
            lines = [f"{len(self.pairs):,} pairs / {counts.total():,} (pair, category) entries: "
                     + ", ".join(f"{category} {counts[category]:,}" for category in order),
                     f"{several:,} pairs in more than one category, {self.repeats:,} repeated rows"]
        if self.tests:
            rows = self.test_rows.total()
            repeats = rows - len(self.tests)
            lines.append(f"{rows:,} test prompts, {repeats:,} of them repeat another")
        for why, numbers in self.refused.items():
            where = ", ".join(map(str, sorted(numbers)))
            lines.append(f"refused {len(numbers):,}: {why}; line {where}")
        return lines


def is_json(path: Path) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.read(4096).lstrip().startswith("{")


def json_rows(file):
    for line_number, line in enumerate(file, 1):
        try:
            if line.strip():
                yield line_number, json.loads(line)
        except (ValueError, RecursionError):
            yield line_number, None


def csv_rows(file):
    reader = csv.reader(file)    # knows line ends and commas inside quotes, and doubled quotes
    header = [name.strip() for name in next(reader, [])]
    line_number = reader.line_num + 1
    for fields in reader:
        if fields:
            yield line_number, dict(zip(header, fields)) if len(fields) == len(header) else None
        line_number = reader.line_num + 1


def numbered_rows(path: Path):
    """Yields (number of a row's first line, {column: value}, or something else if it is not one).
    Raises BadInput where the file is neither CSV nor JSON lines, or not in UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from json_rows(file) if is_json(path) else csv_rows(file)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not in UTF-8 ({error}); --prompts takes CSV and JSON lines, saved "
                       "as UTF-8") from None
    except csv.Error as error:
        raise BadInput(f"{path}: not CSV ({error}); is a quote never closed?") from None


def canonical(name: str) -> str:
    """A category's name as a folder's: "Illegal Activity" -> "illegal-activity". Raises Refused."""
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug:
        raise Refused(f"category {name!r} has no letter or digit")
    return TYPOS.get(slug, slug)


def text_in(row: dict, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise Refused(f"no {column}")
    if re.search("[\ud800-\udfff]", value):    # half a character: no tokenizer and no file takes it
        raise Refused(f"{column} is not valid text")
    return value


def categories_in(row: dict, column: str, default: str | None = None) -> set[str]:
    names = row.get(column) or default or []
    names = names.split(",") if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Refused(f"{column} {names!r} is neither a category nor a list of them")
    return {canonical(name) for name in names if name.strip()}


def inside(folder: Path, name: str) -> Path:
    """folder/name, links followed. Raises Refused unless it is a file in the folder: a file from
    elsewhere must not make us read /etc/passwd or a neighbour's pictures."""
    try:
        path = (folder / name).resolve()
        good = path.is_file() and path.is_relative_to(folder.resolve())
    except (ValueError, OSError, RuntimeError):    # a zero byte, a name too long, links in a circle
        good = False
    if not good or Path(name).is_absolute():
        raise Refused("a picture is not in the folder of --images")
    return path


# The forms of a row. Each gives (the pair's key or None, {side: prompt}, {side: the column with its
# picture's name}). The sides are unsafe and safe, of which a row of CoProV2 has one; or test.
def hugging_face(row: dict):
    label = str(row["label_0"])
    if label not in ("1", "1.0", "True", "0", "0.0", "False"):
        raise Refused("label_0 is neither 1 nor 0: no preference")
    safe, unsafe = ("jpg_0", "jpg_1") if label in ("1", "1.0", "True") else ("jpg_1", "jpg_0")
    # Without a safe prompt it is the empty one: training keeps what the model draws unprompted.
    harmless = text_in(row, "safe") if row.get("safe") else ""
    prompts = {"unsafe": text_in(row, "caption"), "safe": harmless}
    return None, prompts, {"unsafe": unsafe, "safe": safe}


def ours(row: dict):
    prompts = {side: text_in(row, side) for side in ("unsafe", "safe")}
    return None, prompts, {"unsafe": "unsafe_image", "safe": "safe_image"}


def coprov2(row: dict):
    match = IMAGE.fullmatch(text_in(row, "image"))
    if not match:
        raise Refused("image is not a name of CoProV2's (u_idx_0000000_0.jpg, s_idx_0000000_0.jpg "
                      "or 0000000_0.jpg)")
    if not match[1]:
        return test(row)
    side = "unsafe" if match[1] == "u" else "safe"
    return match[2], {side: text_in(row, "prompt")}, {side: "image"}


def test(row: dict):
    return None, {"test": text_in(row, "prompt")}, {}


FORMS = {("jpg_0", "label_0"): hugging_face, ("unsafe",): ours, ("image",): coprov2,
         ("prompt",): test}


def read_row(line: int, row: dict, images: Path | None, default: str | None) -> Pair:
    """A pair, half a pair, or a test prompt, by the first form whose columns the row has.
    Raises Refused."""
    columns = row.keys() if isinstance(row, dict) else set()
    form = next((form for wanted, form in FORMS.items() if columns >= set(wanted)), None)
    if not form:
        raise Refused("not a row with known columns (prompt, image, category; "
                      "jpg_0, jpg_1, label_0, caption; unsafe, safe; prompt)")
    key, prompts, pictures = form(row)
    if "" in prompts.values() and not images:
        raise Refused("a Hugging Face row has no safe prompt to draw; give --images")
    categories = categories_in(row, "category", default)
    if not categories and form is not test:
        raise Refused("no category; add one, or give --concept")
    if form is coprov2 and not categories <= PUBLISHED:
        raise Refused(f"category {row.get('category') or default!r} is none of CoProV2's")
    names = {side: text_in(row, column) for side, column in pictures.items() if images}
    paths = {side: inside(images, name) for side, name in names.items()}
    key = key or json.dumps([*prompts.values(), *names.values()])
    return Pair(key, line, prompts, paths, categories)


def join(known: Pair, part: Pair):
    """Adds to a pair what another row says of it."""
    for side, prompt in part.prompts.items():
        if known.prompts.get(side, prompt).casefold().split() != prompt.casefold().split():
            raise Refused("the same index and kind as a row above, with another prompt")
    known.prompts = part.prompts | known.prompts
    known.images = part.images | known.images
    known.categories |= part.categories


def read_prompts(path: Path, images: Path | None = None, default: str | None = None) -> Prompts:
    """Reads one file. images: the folder of the pairs' pictures, if they exist; default: the
    category of rows that name none. Raises BadInput if none of its rows can be used."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; --prompts takes CSV and JSON lines")
    pairs, tests, rows, test_rows, refused = {}, {}, Counter(), Counter(), {}
    for line, row in numbered_rows(path):
        try:
            part = read_row(line, row, images, default)
            if "test" in part.prompts:
                tests.setdefault(part.prompts["test"], set()).update(part.categories)
                test_rows[part.prompts["test"]] += 1
            else:
                join(pairs.setdefault(part.key, Pair(part.key, line)), part)
                rows[part.key, *part.prompts, *sorted(part.categories)] += 1
        except Refused as why:
            refused.setdefault(str(why), []).append(line)
    halves = [pair.line for pair in pairs.values() if len(pair.prompts) == 1]
    if halves:
        refused["the pair's other half is missing or refused"] = halves
    whole = [pair for pair in pairs.values() if len(pair.prompts) == 2]
    if not whole and not tests:
        why, lines = next(iter(refused.items()), ("it is empty", [1]))
        raise BadInput(f"{path}: no row can be used; line {lines[0]}: {why}")
    return Prompts(whole, tests, test_rows, rows.total() - len(rows), refused)


@dataclass
class Request:
    """A prompt to draw. categories: empty for a safe prompt, None where nobody said.
    seed, guidance: the prompt's own, if any."""
    prompt: str
    categories: set[str] | None = None
    seed: int | None = None
    guidance: float | None = None


def number_in(row: dict, columns: tuple[str, ...], kind) -> int | float | None:
    """The first of the columns that the row fills, read as a flag of that kind would be."""
    column = next((column for column in columns if row.get(column) not in (None, "")), None)
    try:
        return column and kind(str(row[column]).strip().removesuffix(".0"))
    except argparse.ArgumentTypeError as error:
        raise Refused(f"{column} {error}") from None


def read_request(row: dict) -> Request:
    if not isinstance(row, dict):
        raise Refused("not a row with the columns of the header, nor a JSON object")
    column = next((column for column in ("category", "categories") if column in row), None)
    categories = categories_in(row, column) if column else None
    image = IMAGE.fullmatch(str(row.get("image")))
    if image and image[1] == "s":
        categories = set()    # half of a CoProV2 pair: its category is what it is safe from
    return Request(text_in(row, "prompt"), categories, number_in(row, SEEDS, natural),
                   number_in(row, GUIDANCES, number))


def read_requests(path: Path) -> tuple[list[Request], list[str]]:
    """The prompts of a file in its order, and notes: sentences on what was not taken as it stands.
    In CSV a row that repeats another's prompt, seed and guidance only adds its category: so do
    the published files name several. Raises BadInput for a row that cannot be used."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; python make_data.py writes data/test.jsonl")
    table, rows, sized, requests = not is_json(path), 0, 0, {}
    for line, row in numbered_rows(path):
        try:
            request = read_request(row)
        except Refused as why:
            raise BadInput(f"{path} line {line}: {why}; correct the line or leave it out") from None
        key = (request.prompt, request.seed, request.guidance) if table else line
        first = requests.setdefault(key, request)
        if request.categories:
            first.categories |= request.categories
        rows += 1
        sized += any(str(row.get(column) or 512) != "512" for column in SIZES)
    notes = []
    if len(requests) < rows:
        notes.append(f"{path}: {rows - len(requests):,} of {rows:,} rows repeat another's prompt, "
                     "seed and guidance and are drawn once")
    if sized:
        notes.append(f"{path}: {sized:,} of {rows:,} rows name a size other than 512 x 512, which "
                     "is not used; --size sets the side of all pictures")
    return list(requests.values()), notes


def held_out(pairs: list[Pair], seed: int) -> set[str]:
    """A tenth of each category's unsafe prompts, by a hash: the order of rows does not matter."""
    by_category: dict[str, set[str]] = {}
    for pair in pairs:
        for category in pair.categories:
            by_category.setdefault(category, set()).add(pair.prompts["unsafe"])
    held = set()
    for prompts in by_category.values():
        order = sorted(prompts, key=lambda text: (zlib.crc32(f"{seed} {text}".encode()), text))
        held.update(order[:len(order) // 10])
    return held


def split(pairs: list[Pair], tests: dict[str, set[str]], seed: int):
    """(the pairs to train on, {prompt to test on: categories}), which share no prompt.

    Where files gave test prompts, all pairs are trained on. Else some are held out: their unsafe
    prompts are tested on, and their safe ones, as safe. A prompt of two pairs is on one side.
    """
    if not tests:
        held, tests = held_out(pairs, seed), {}
        left_out = [pair for pair in pairs if pair.prompts["unsafe"] in held]
        pairs = [pair for pair in pairs if pair.prompts["unsafe"] not in held]
        for pair in left_out:
            tests.setdefault(pair.prompts["unsafe"], set()).update(pair.categories)
        for pair in left_out:
            tests.setdefault(pair.prompts["safe"], set())
    trained = {"", *(prompt for pair in pairs for prompt in pair.prompts.values())}
    return pairs, {prompt: names for prompt, names in tests.items() if prompt not in trained}
