"""What every script does the same way: flags, one-line errors, files moved into place.

Needs:       nothing but Python (torch is imported after the flags are parsed, so that --help is instant).
Gives:       Parser, BadInput, run(), replacing(), check_folder(), save_tensors(), opened(), prune(), read_jsonl(), write_jsonl(),
             read_pairs(), sha256(), stopping().
"""
import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from pathlib import Path

TOY = Path(__file__).parent / "toy"
MOST = 2 ** 32 - 1  # that a flag may count or a seed be: what other programs take as seeds, and far from where torch gives up
DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int64": "I64", "torch.uint8": "U8"}  # as safetensors calls them


class BadInput(Exception):
    """Something the user gave is wrong. The message names the file and value and says how to fix it."""


class PlainParser(argparse.ArgumentParser):
    """argparse with errors of one line, and no flag by half its name."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        sys.exit(complain(message + "; see --help"))


class Parser(PlainParser):
    """The same with the flags that all scripts take. Defaults are in the help."""

    def __init__(self, description: str):
        super().__init__(description)
        self.add_argument("--model", type=Path, default=TOY, help="Stable Diffusion 1, 2 or XL: a diffusers folder or a single .safetensors file (default: the embedded model/toy)")
        self.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
        self.add_argument("--device", default="auto",
                          help="torch device; auto is cuda, then mps, then cpu (default: auto)")

    def parse_args(self, *arguments):
        args = super().parse_args(*arguments)
        if args.seed < 0:
            self.error(f"--seed {args.seed} is negative; use 0 or more")
        for name, value in vars(args).items():
            if isinstance(value, int) and value > MOST:
                self.error(f"--{name.replace('_', '-')} {value} is too large; use at most {MOST}")
        return args


def complain(message: str) -> int:
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return 2


def run(main, *arguments):
    """Runs a script: bad input is one line on stderr and exit status 2, Ctrl-C is exit status 130."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold what no terminal can print
    try:
        main(*arguments)
    except BadInput as error:
        sys.exit(complain(error))
    except OSError as error:  # a read-only folder, a full disk
        sys.exit(complain(f"{error.filename or 'a file'}: {error.strerror or error}; check the path, its rights and the space left"))
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def replacing(path: Path):
    """Yields a temporary path beside `path`, moved over it only when the block ends well: never half a file or folder. An
    OSError names `path`: a full disk is found by whoever writes, and that is an open file without a name, or the temporary."""
    path = Path(path)
    if not path.name or (path.exists() and not path.is_file() and not path.is_dir()):    # a device must stay one
        raise BadInput(f"{path}: cannot be written as a file; give a file's name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        where = str(error.filename2 or error.filename or path).replace(str(temporary), str(path))
        raise OSError(error.errno, error.strerror or str(error), where) from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def check_folder(folder: Path):
    """Raises BadInput if files cannot be written there, whether it exists yet or not: now, and not after hours of work."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BadInput(f"{folder}: {there} is no folder that can be written to; give another --out, or change its rights")


def save_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None):
    """A safetensors file (the header's length, a JSON header, the tensors' bytes) in one move. By hand, since the library's writer
    puts the metadata in a random order, another in each process, where the same command must give the same bytes; its errors
    are no OSErrors; and a second temporary file of its own outlives it when it is killed."""
    import torch
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))     # as the library: the widest first, so that all are aligned
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in names:
        start, end, t = end, end + tensors[name].nbytes, tensors[name]
        header[name] = {"dtype": DTYPES[str(t.dtype)], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def opened(path: Path):
    """safetensors.safe_open: a with block's file, whose tensors are memory-mapped. Raises BadInput for whatever is not a
    whole safetensors file. The library checks the header: its length, its JSON, and that the tensors fill the file."""
    from safetensors import SafetensorError, safe_open
    if not Path(path).is_file():  # of a pipe the library would wait for ever
        raise BadInput(f"{path}: no such file; give a safetensors file")
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if start in (b"PK", b"\x80\x02", b"\x80\x04"):  # a zip or a bare pickle, as torch.save writes them
            raise BadInput(f"{path}: not a safetensors file but a pickle, as .ckpt, .pt and .bin files are, and pickles are never "
                           "opened; get it in safetensors form") from None
        raise BadInput(f"{path}: not a readable safetensors file ({error}); copy or download it again") from None


def prune(folder: Path, pattern: str, keep: set[str]):
    """Removes the files of an earlier, larger run: a picture folder holds what its index lists, no more. But not what another
    process that runs is just writing, whose number replacing() puts into the name."""
    for path in folder.glob(pattern):
        writer = re.search(r"\.(\d+)\.tmp$", path.name)
        if path.name not in keep and not (writer and running(int(writer[1]))):
            path.unlink(missing_ok=True)


def running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except PermissionError:  # somebody else's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return process != os.getpid()


def write_jsonl(path: Path, rows: list[dict]):
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict]:
    """Raises BadInput naming file and line where a line is not a JSON object in UTF-8."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(json.loads(line.decode("utf-8")))
            if not isinstance(rows[-1], dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise BadInput(f"{path} line {number}: not a JSON object ({error}); make the data again") from None
    return rows


def read_pairs(data: Path, concept: str) -> list[dict]:
    """The pairs of data/<concept>/pairs.jsonl: prompts "safe" and "unsafe", and "safe_image" and "unsafe_image" as full
    paths. Raises BadInput if there are none or a row lacks one of the four."""
    file = data / concept / "pairs.jsonl"
    if not file.is_file():
        raise BadInput(f"{file}: no such file; run python make_data.py --concept {concept}")
    rows = read_jsonl(file)
    for number, row in enumerate(rows, 1):
        wrong = [key for key in ("safe", "unsafe", "safe_image", "unsafe_image") if not isinstance(row.get(key), str)]
        if wrong:
            raise BadInput(f"{file} line {number}: {wrong[0]} is missing or not a text; make the data again")
        for image in (row["safe_image"], row["unsafe_image"]):
            if Path(image).is_absolute() or ".." in Path(image).parts:
                raise BadInput(f"{file} line {number}: {image!r} leaves the folder; put the pictures below {file.parent}")
        row |= {key: file.parent / row[key] for key in ("safe_image", "unsafe_image")}
    if not rows:
        raise BadInput(f"{file}: holds no pairs; make the data again with more --pairs")
    return rows


def sha256(*paths: Path) -> str:
    """Hex digest of the files' bytes, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def stopping():
    """Yields asked(): whether Ctrl-C or SIGTERM has come, or this worker's parent is gone. The block goes on until it
    asks, so that it can stop at a place of its choice; a second Ctrl-C acts at once (a worker waits: the pool, once one
    worker has ended, tells the others again)."""
    came, parent = [], multiprocessing.parent_process()

    def note(number, _):
        came.append(number)
        if parent is None:
            signal.signal(number, before[number])
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came) or (parent is not None and not parent.is_alive())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came and parent is not None:   # a worker that was told to end takes no further piece of work
            os.kill(os.getpid(), signal.SIGTERM)
