"""Prompts from files: CSV, JSON, .txt -> preference pairs and test prompts. It only reads.

Needs:       nothing but Python.
Gives:       read_prompts() and split() for make_data.py, read_requests() for sample.py.

A row's form is known by its columns, in JSON (lines, or a list) as in a CSV file with a header:
    Hugging Face  jpg_0, jpg_1, label_0, caption   label_0 1: jpg_0 is the preferred (safe) picture,
                                                   0: jpg_1 is; safe: the safe prompt, if any
    ours          unsafe, safe                     safe_image, unsafe_image: pictures that exist
    CoProV2       prompt, image, category          u_idx_0000012_0.jpg and s_idx_0000012_0.jpg are
                                                   ONE pair, wherever they stand; 0000012_0.jpg is
                                                   an unsafe prompt of the test split
    test          prompt                           to test on; without a category: a safe prompt
    I2P           prompt, categories, and a seed and a guidance: for sample.py alone
Several categories are separated by commas, or a list. A row without one has that of --concept. A
line of a .txt file is a row with a prompt alone.
"""
import argparse
import csv
import io
import json
import re
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from model.tools.command import BadInput, finite_float, natural_int

TYPOS = {"harrasment": "harassment"}    # as CoProV2 spells it
BETWEEN = re.compile(r"[\s,\[\]]*")    # rows of JSON
IMAGE = re.compile(r"(?:.*/)?(?:([us])_idx_)?(\d+_\d+)\.\w+")    # (u, s or neither, index)
SEEDS = ("sd_seed", "evaluation_seed", "seed")    # of I2P, of ESD's files, of index.jsonl
GUIDANCES = ("sd_guidance_scale", "evaluation_guidance", "guidance")
SAFE_TESTS = 100    # pairs of a category that are held out for their safe prompts, at most
SIZES = ("sd_image_width", "sd_image_height")
# The forms: {side: (column of the prompt, column of the picture)}.
OURS = {"unsafe": ("unsafe", "unsafe_image"), "safe": ("safe", "safe_image")}
HUGGING_FACE = {"1": {"unsafe": ("caption", "jpg_1"), "safe": ("safe", "jpg_0")},    # by label_0
                "0": {"unsafe": ("caption", "jpg_0"), "safe": ("safe", "jpg_1")}}
COPROV2 = {"u": {"unsafe": ("prompt", "image")}, "s": {"safe": ("prompt", "image")},
           None: {"test": ("prompt", None)}}    # by the start of the picture's name


class Refused(ValueError):
    """Why a row cannot be used. One fault always has the same words, so that it can be counted."""


@dataclass
class Pair:
    """prompts, images: of "unsafe" and "safe"; no images where they are to be drawn. key: its index
    or its texts. line: of its first row. categories: one pair may stand for several harms."""
    key: str
    line: int
    prompts: dict[str, str]
    images: dict[str, Path]
    categories: set[str]


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
        counts = Counter(category for pair in self.pairs for category in sorted(pair.categories))
        several = sum(len(pair.categories) > 1 for pair in self.pairs)
        rows, lines = self.test_rows.total(), []
        if counts:
            each = ", ".join(f"{name} {n:,}" for name, n in counts.most_common())
            lines = [f"{len(self.pairs):,} pairs / {counts.total():,} (pair, category) entries: "
                     f"{each}; {several:,} pairs in more than one category, {self.repeats:,} "
                     "repeated rows"]
        if rows:
            lines.append(f"{rows:,} test prompts, {rows - len(self.tests):,} of them repeat "
                         "another")
        return lines + [f"refused {len(numbers):,}: {why}; line {', '.join(map(str, numbers))}"
                        for why, numbers in self.refused.items()]


def csv_rows(file):
    reader = csv.DictReader(file, skipinitialspace=True)
    for row in reader:    # with None for a field too much or too few
        yield reader.line_num, None if None in (*row, *row.values()) else row


def json_rows(text: str):
    """Of objects one after another: a line each, over several lines, or in a list."""
    decoder = json.JSONDecoder(parse_constant=lambda name: None)    # NaN, as pandas writes nothing
    at, line = 0, 1
    while (start := BETWEEN.match(text, at).end()) < len(text):
        try:
            row, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):    # go on after the line
            row, end = None, text.find("\n", start) % (len(text) + 1)
        at, line = end, line + text.count("\n", at, end)
        yield line, row if isinstance(row, dict) else None


def numbered_rows(path: Path):
    """[(number of a row's last line, {column: value} or, if it is broken, None)]. Raises BadInput
    where the file is missing, or is none of the kinds above in UTF-8."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; --prompts takes CSV, JSON and .txt, such as the "
                       "data/test.jsonl of make_data.py")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".txt":
            return [(number, {"prompt": line}) for number, line in enumerate(text.splitlines(), 1)
                    if line.strip()]
        if text.lstrip().startswith(("{", "[")):
            return list(json_rows(text))
        return list(csv_rows(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: neither CSV, JSON nor text in UTF-8 ({error}); save it as one of "
                       "them, with every quote closed") from None


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
    if re.search("[\ud800-\udfff]", value):    # half a character, which no tokenizer takes
        raise Refused(f"{column} is not valid text")
    return value


def categories_in(row: dict, column: str, default: str | None = None) -> set[str]:
    names = row.get(column) or default or []
    names = names if isinstance(names, list) else str(names).split(",")
    return {canonical(str(name)) for name in names if str(name).strip()}


def number_in(row: dict, columns: tuple[str, ...], kind) -> int | float | None:
    """The first of the columns that the row fills, read as a flag of that kind would be."""
    column = next((column for column in columns if row.get(column) not in (None, "")), None)
    try:
        return column and kind(str(row[column]).strip().removesuffix(".0"))
    except argparse.ArgumentTypeError as error:
        raise Refused(f"{column} {error}") from None


def unbroken(row: dict | None) -> dict:
    if row is None:
        raise Refused("not a row with the columns of the header, nor a JSON object")
    return row


def form_of(row: dict):
    """(the index that a row of CoProV2 has, one of the forms above). Raises Refused."""
    if "label_0" in row:
        label = str(row["label_0"]).removesuffix(".0")
        if label not in HUGGING_FACE:
            raise Refused("label_0 is neither 1 nor 0: no preference")
        return None, HUGGING_FACE[label]
    if "unsafe" in row:
        return None, OURS
    image = IMAGE.fullmatch(str(row.get("image", "0_0.jpg")))    # without one: a test prompt
    if "prompt" not in row or not image:
        raise Refused(f"its columns, {', '.join(row)[:80]}, are not those of a known form (prompt, "
                      "image as CoProV2 names it, category; jpg_0, jpg_1, label_0, caption; "
                      "unsafe, safe; prompt)")
    return image[2], COPROV2[image[1]]


def read_row(line: int, row: dict, pictures: dict[str, Path] | None, default: str | None) -> Pair:
    """A pair, half a pair, or a test prompt. pictures: {name: path} of those that may be read; None
    where they are to be drawn. Raises Refused."""
    index, form = form_of(row)
    prompts, images, categories = {}, {}, categories_in(row, "category", default)
    if not categories and "test" not in form:
        raise Refused("no category; add one, or give --concept")
    for side, (column, picture) in form.items():
        if column == "safe" and not row.get("safe"):
            if pictures is None:
                raise Refused("no safe prompt to draw; give one, or --images")
            prompts[side] = ""    # training keeps what is drawn without a prompt
        else:
            prompts[side] = text_in(row, column)
        if picture and pictures is not None:
            images[side] = pictures.get(text_in(row, picture))
    if None in images.values():
        raise Refused("a picture is not in the folder of --images")
    texts = [row[column] for columns in form.values() for column in columns if column in row]
    return Pair(index or json.dumps(texts), line, prompts, images, categories)


def join(known: Pair, part: Pair):
    """Adds to a pair what another row says of it. Raises Refused."""
    for side, prompt in part.prompts.items():
        if known.prompts.setdefault(side, prompt).casefold().split() != prompt.casefold().split():
            raise Refused("the same index and kind as a row above, with another prompt")
    known.images = part.images | known.images
    known.categories |= part.categories


def read_prompts(path: Path, images: Path | None = None, default: str | None = None) -> Prompts:
    """Reads one file. images: the folder of the pairs' pictures, if they exist; default: the
    category of rows that name none. Raises BadInput if none of its rows can be used."""
    pictures = None
    if images:    # no links: a name in a file from elsewhere must not make us read /etc/passwd
        pictures = {file.relative_to(images).as_posix(): file for file in images.rglob("*")
                    if file.is_file() and not file.is_symlink()}
    pairs, tests, refused = {}, defaultdict(set), defaultdict(list)
    pair_rows, test_rows = Counter(), Counter()
    for line, row in numbered_rows(path):
        try:
            part = read_row(line, unbroken(row), pictures, default)
            if "test" in part.prompts:
                tests[part.prompts["test"]] |= part.categories
                test_rows[part.prompts["test"]] += 1
            else:
                join(pairs.setdefault(part.key, part), part)
                pair_rows[part.key, *part.prompts, *sorted(part.categories)] += 1
        except Refused as why:
            refused[str(why)].append(line)
    for pair in pairs.values():
        if len(pair.prompts) == 1:
            refused["the pair's other half is missing or refused"].append(pair.line)
    whole = [pair for pair in pairs.values() if len(pair.prompts) == 2]
    if not whole and not tests:
        why, lines = next(iter(refused.items()), ("it is empty", [1]))
        raise BadInput(f"{path}: no row can be used; line {lines[0]}: {why}")
    return Prompts(whole, tests, test_rows, pair_rows.total() - len(pair_rows), refused)


def held_out(pairs: list[Pair], seed: int, most: int | None) -> set[str]:
    """A tenth of each category's unsafe prompts, at most `most`, by a hash: the order of rows does
    not matter."""
    held = set()
    for category in set().union(*(pair.categories for pair in pairs)):
        texts = {pair.prompts["unsafe"] for pair in pairs if category in pair.categories}
        order = sorted(texts, key=lambda text: (zlib.crc32(f"{seed} {text}".encode()), text))
        held.update(order[:len(order) // 10][:most])
    return held


def split(pairs: list[Pair], tests: dict[str, set[str]], seed: int):
    """(the pairs to train on, {prompt to test on: categories}), which share no prompt.

    Where files gave test prompts, safe ones too, all pairs are trained on. Else some are held out,
    and tested on: their safe prompts, as safe, without which nobody sees what safety costs; and,
    where files gave none, their unsafe ones. A prompt of two pairs is on one side.
    """
    given, tests = bool(tests), defaultdict(set, tests)
    if all(tests.values()):
        held = held_out(pairs, seed, SAFE_TESTS if given else None)
        aside = [pair for pair in pairs if pair.prompts["unsafe"] in held]
        pairs = [pair for pair in pairs if pair.prompts["unsafe"] not in held]
        for pair in [] if given else aside:
            tests[pair.prompts["unsafe"]] |= pair.categories
        for pair in aside:
            tests.setdefault(pair.prompts["safe"], set())
    trained = {"", *(prompt for pair in pairs for prompt in pair.prompts.values())}
    return pairs, {prompt: names for prompt, names in tests.items() if prompt not in trained}


@dataclass
class Request:
    """A prompt to draw. categories: empty for a safe prompt, None where nobody said.
    seed, guidance: the prompt's own, if any."""
    prompt: str
    categories: set[str] | None = None
    seed: int | None = None
    guidance: float | None = None


def read_request(row: dict | None) -> Request:
    row = unbroken(row)
    column = "category" if "category" in row else "categories"
    categories = categories_in(row, column) if column in row else None
    image = IMAGE.fullmatch(str(row.get("image")))
    if image and image[1] == "s":
        categories = set()    # half of a CoProV2 pair: its category is what it is safe from
    return Request(text_in(row, "prompt"), categories, number_in(row, SEEDS, natural_int),
                   number_in(row, GUIDANCES, finite_float))


def read_requests(path: Path):
    """The prompts of a file, one a row and in its order, and notes: sentences on what a total of
    them would not show. A row that repeats another is kept, so that totals are those of the file,
    as published ones are; make_data.py writes a prompt once for each of its categories. Raises
    BadInput for a row that cannot be used."""
    rows, requests, sized, notes = numbered_rows(path), [], 0, []
    for line, row in rows:
        try:
            requests.append(read_request(row))
        except Refused as why:
            raise BadInput(f"{path} line {line}: {why}; correct the line or leave it out") from None
        sized += any(str(row.get(column) or 512) != "512" for column in SIZES)
    repeats = len(rows) - len({(one.prompt, one.seed, one.guidance) for one in requests})
    if repeats:
        notes.append(f"{path}: {repeats:,} of {len(rows):,} rows repeat another's prompt, seed and "
                     "guidance; they are drawn and counted like all others")
    if sized:
        notes.append(f"{path}: {sized:,} of {len(rows):,} rows name a size other than 512 x 512, "
                     "which is not used; --size sets the side of all pictures")
    return requests, notes
