"""Files: written whole or not at all, never unpickled, and the same bytes from the same command.

Needs:       torch, safetensors.
Gives:       replacing(), check_folder(), file_name(); save_tensors(), opened(), finite(),
             places(), read_tensors(), Sums; read_json(), write_json(), read_jsonl(), write_jsonl();
             sha256(), short_hash(), tensors_hash(); prepare(), clean().
"""
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from model.tools.command import BadInput

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.uint8: "U8", torch.int32: "I32", torch.float64: "F64",
          torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}    # safetensors' names
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def file_name(label: str) -> str:
    """The label where a file system takes it as a name, of 255 bytes at most; else its start, and a
    hash of it all."""
    if len(label.encode(errors="replace")) <= 255:
        return label
    return f"{label[:40]}... {digest(label)[:8]}"


@contextlib.contextmanager
def replacing(path: Path):
    """Yields a temporary path beside `path`, moved over it when the block ends well: never half a
    file or folder. An OSError names `path`."""
    if not path.name or (path.exists() and not path.is_file() and not path.is_dir()):
        raise BadInput(f"{path}: cannot be written as a file; give a file's name")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cut: 255 bytes are the most that a name may have, 4 a letter.
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        named = str(error.filename2 or error.filename or path).replace(str(temporary), str(path))
        raise OSError(error.errno, error.strerror or str(error), named) from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def clean(folder: Path):
    """Removes the temporary files and folders of killed commands, not of running ones."""
    for path in folder.glob(".*.tmp"):
        writer = re.search(r"\.(\d+)\.tmp$", path.name)
        if writer and not running(int(writer[1])):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def running(process: int) -> bool:
    if sys.platform == "win32":    # where the signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)    # sends nothing
    except PermissionError:    # somebody else's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return process != os.getpid()


def check_folder(folder: Path):
    """Raises BadInput if files cannot be written there: now, and not after hours of work. Removes
    what killed commands left."""
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"{folder}: {parent} is not a folder that can be written to; give another "
                       "--out, or change its rights")
    clean(folder)


def prepare(folder: Path, settings: dict, patterns: tuple[str, ...]):
    """Makes `folder` ready for files of these patterns that are made with these settings (JSON),
    which it keeps in settings.json. Files of other settings are removed, and that is said on
    stderr. Raises BadInput for such files without settings: they are somebody else's."""
    file = folder / "settings.json"
    files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    wanted = json.loads(json.dumps(settings))
    try:
        made_with = read_json(file) if file.is_file() else None
    except BadInput:
        made_with = {}    # damaged
    if files and made_with is None:
        raise BadInput(f"{files[0]}: was not made by this program; give another --out, or move it "
                       "away")
    if files and made_with != wanted:
        print(f"note: {folder}: was made with other settings, and is made anew", file=sys.stderr)
        for path in files:
            path.unlink()
    for pattern in patterns:
        clean((folder / pattern).parent)
    if made_with != wanted:
        write_json(file, wanted)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]):
    """A safetensors file: the header's length, a JSON header, the tensors' bytes. By hand, since
    the library's writer puts the metadata in another order in each process."""
    # As the library does it: the widest dtype first, so that all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {"__metadata__": metadata}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    text = text.encode(errors="replace")
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            data = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
            file.write(data.numpy().data)


def opened(path: Path):
    """safetensors.safe_open, for a with block; its tensors are memory-mapped. Raises BadInput for
    whatever is not a whole safetensors file: the library checks that the tensors fill the file."""
    if not path.is_file():    # of a pipe the library would wait for ever
        raise BadInput(f"{path}: no such file; give a safetensors file")
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if start in (b"PK", b"\x80\x02", b"\x80\x04"):    # a zip or a bare pickle, of torch.save
            raise BadInput(f"{path}: not a safetensors file but a pickle, as .ckpt, .pt and .bin "
                           "files are, and pickles are never opened; get it in safetensors "
                           "form") from None
        raise BadInput(f"{path}: not a readable safetensors file ({error}); copy or download it "
                       "again") from None


def finite(x: torch.Tensor) -> bool:
    """By its sum, which is infinite for large numbers too: the exact answer takes 20 times as
    long."""
    return bool(x.sum().isfinite() or x.isfinite().all())


class Place(NamedTuple):
    """Where a tensor lies in its file: bytes from start to end, counted from where data begins."""
    key: str
    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]


@lru_cache
def places_of(header: str) -> tuple[Place, ...]:
    """What a header without metadata says, sorted by key. Headers that are alike are understood
    once, and give the same object."""
    return tuple(Place(key, *entry["data_offsets"], entry["dtype"], tuple(entry["shape"]))
                 for key, entry in sorted(json.loads(header).items()))


def places(path: Path):
    """Of a safetensors file: the places, sorted by key; the metadata; and the byte where data
    begins. Raises BadInput as opened() does: the library has checked what is read here."""
    opened(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size).decode().rstrip()
    metadata, start = {}, '{"__metadata__":'
    if header.startswith(start):    # where writers put it; what follows is alike in alike files
        metadata, end = json.JSONDecoder().raw_decode(header, len(start))
        header = "{" + header[end:].lstrip(",")
    elif "__metadata__" in header:
        entries = json.loads(header)
        metadata, header = entries.pop("__metadata__", None), json.dumps(entries)
    return places_of(header), metadata or {}, 8 + size


def read_tensors(files, wanted: list[Place]):
    """{key: what lies there, fp32, [file, number]} of files (path, where its data begins) that are
    alike. Neighbours of one dtype are read and checked as one: a LoRA has hundreds of small
    tensors, for which the library takes long. Raises BadInput, naming the file, for NaN, infinity
    and unusual dtypes."""
    runs, tensors = [], {}
    for place in sorted(wanted, key=lambda place: place.start):
        last = runs[-1][-1] if runs else place
        if (last.end, last.dtype) != (place.start, place.dtype):
            runs.append([])
        runs[-1].append(place)
    blocks = [torch.empty(len(files), run[-1].end - run[0].start, dtype=torch.uint8)
              for run in runs]
    for i, (path, begin) in enumerate(files):
        with open(path, "rb") as file:
            for run, block in zip(runs, blocks):
                file.seek(begin + run[0].start)
                file.readinto(block[i].numpy())
    for run, block in zip(runs, blocks):
        first, (path, _) = run[0], files[0]
        if first.dtype not in BY_NAME:
            raise BadInput(f"{path}: {first.key} of {first.dtype} cannot be read; save it as F32")
        block = block.view(BY_NAME[first.dtype]).float()
        if not finite(block):
            path = next(path for (path, _), numbers in zip(files, block) if not finite(numbers))
            raise BadInput(f"{path}: {first.key} or a tensor after it holds NaN or infinity; make "
                           "this file again")
        parts = block.split([math.prod(place.shape) for place in run], 1)
        tensors |= {place.key: part for place, part in zip(run, parts)}
    return tensors


@lru_cache
def scratch():
    """A file of this process without a name, and its lock. Unbuffered: a full disk is told at once.
    """
    return tempfile.TemporaryFile(buffering=0), threading.Lock()


class Sums:
    """{key: a sum of tensors, fp32}. They lie in scratch(), so that memory holds none of them."""

    def __init__(self):
        self.places = {}    # {key: (first byte, shape)}

    def add(self, key, x: torch.Tensor):
        """x: on any device; of one shape for a key."""
        file, lock = scratch()
        x = x.cpu() + self[key] if key in self.places else x.cpu()
        data = memoryview(x.contiguous().numpy()).cast("B")
        with lock:
            begin, _ = self.places.setdefault(key, (file.seek(0, os.SEEK_END), x.shape))
            file.seek(begin)
            try:
                while data:
                    data = data[file.write(data):]
            except OSError as error:
                raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None

    def __getitem__(self, key) -> torch.Tensor:
        (file, lock), (begin, shape) = scratch(), self.places[key]
        x = torch.empty(shape)
        with lock:
            file.seek(begin)
            file.readinto(x.numpy())
        return x

    def values(self) -> list[torch.Tensor]:
        return [self[key] for key in self.places]


def json_object(data: bytes, what: str, cure: str) -> dict:
    """Raises BadInput for what is not a JSON object in UTF-8."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{what}: not JSON ({error}); {cure}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{what}: not a JSON object; {cure}")
    return value


def read_json(path: Path) -> dict:
    """Raises BadInput for a file that is not there or not a JSON object."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; copy or make it again") from None
    return json_object(data, str(path), "copy or make it again")


def write_json(path: Path, value: dict):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """Raises BadInput naming file and line where a line is not a JSON object in UTF-8."""
    return [json_object(line, f"{path} line {number}", "make the data again")
            for number, line in enumerate(path.read_bytes().splitlines(), 1)]


def write_jsonl(path: Path, rows: list[dict]):
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def digest(value) -> str:
    """Hex digest of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(*paths: Path) -> str:
    """Hex digest of the files' bytes, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def tensors_hash(path: Path) -> str:
    """The twelve hex digits by which A1111 knows a LoRA: of all that follows a safetensors file's
    header, as kohya's sshs_model_hash."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()[:12]


def short_hash(path: Path) -> str:
    """The eight hex digits by which A1111 and Civitai (AutoV1) know a checkpoint: of the 64 KiB
    after its first MiB. It costs nothing; sha256() of a real model takes seconds."""
    with open(path, "rb") as file:
        file.seek(1 << 20)
        return hashlib.sha256(file.read(1 << 16)).hexdigest()[:8]
