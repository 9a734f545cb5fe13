"""Damaged files and odd command lines, of which test_all.py tries some.

What it is:  each case comes from its number. A damaged file is read, or refused by BadInput,
             within 20 seconds; a command with odd flags ends well, or with exit status 2, one line
             "error: ..." and nothing written. Anything else is raised, with a note of the case;
             what takes too long ends this process.
Needs:       a story: a folder with the data/, experts/ and merged.safetensors of a short run.
Gives:       fuzz_files(), fuzz_commands().
"""
import argparse
import contextlib
import faulthandler
import io
import os
import random
import re
import shutil
from itertools import product
from pathlib import Path
from unittest import mock

import torch

import make_data
import merge
import sample
import train
from model.data.language_model import read_concepts
from model.data.pairs import read_latents, read_pairs, read_square
from model.data.prompt_files import read_prompts, read_requests
from model.formats.checkpoint import encoder_files
from model.formats.lora_file import load as load_lora
from model.stable_diffusion import load
from model.testing.checkpoints import single_file
from model.tools.command import BadInput, at_strength, run
from model.tools.files import sha256
from model.tools.images import read_images
from model.toy import TOY

ODD = b"""0 -1 3 1e999 NaN 999999999999 18446744073709551616 null true [] {} "" "../../x"
         x""".split()
WORD = re.compile(rb'-?\d+(\.\d+)?|"[^"]*"|[A-Za-z_]+')
TEXTS = {
    "c.json": '{"hate": ["one thing", "another"], "my own": ["a third"]}',
    "i2p.csv": "prompt,categories,sd_seed,sd_guidance_scale\n"
               '"a, b","hate, violence",12,7.5\nc,shocking,3,7\n',
    "coprov2.csv": "prompt,image,category\n"
                   "u 0,u_idx_0_0.jpg,\"{'hate'}\"\ns 0,s_idx_0_0.jpg,\"{'hate'}\"\n"
                   "u 1,u_idx_1_0.jpg,\"{'hate'}\"\ns 1,s_idx_1_0.jpg,\"{'hate'}\"\n"}
# What works and is small; a case adds one to three flags to it.
SCRIPTS = {
    make_data: "--concept hate --pairs 1 --steps 1 --batch 1 --judge none --out new",
    train: "--concept hate --steps 1 --batch 1 --rank 1 --out new",
    merge: "experts --method sum --out new.safetensors", sample: "x --steps 1 --out new"}
LORA, ODD_NAME = "experts/hate.safetensors", "\udcff \u00e4@1.safetensors"
NUMBERS = "0 -1 1 2 3 0.5 1.0 nan inf -inf 1e38 1e308 1e-320 -0.0 99999999999 0x1 \u0663".split()
PATHS = f""". .. nowhere/x data data/test.jsonl data/hate/images sheet.png toy cut.safetensors
            experts pipe sheet.png/x deep/er/x.png link {LORA} {LORA}@ {LORA}@nan {LORA}@1e30
            {LORA}@@0.5 {"x" * 300}""".split()
WORDS = "hate all ../hate data/hate @ @1 cpu cuda:99 meta hpu q16: q16:data toy none".split()
STRANGE = ["", " ", "-", "--", "\udcff", "\u00e4\U0001f642 \u202e", "a\nb", "%s{0}", "'; x", "=",
           "--no-such-flag", "[", ODD_NAME]
VALUES = {Path: PATHS, at_strength: PATHS, None: WORDS}
LATE = re.compile("was kept|NaN or inf")    # known only when images are there


def mutated(data: bytes, rng: random.Random, tensors=False) -> bytes:
    """One to three changes of the bytes, or of what the text says. Of safetensors mostly of the
    header, whose length is then put right, to get past the library's first look."""
    if tensors and rng.random() < 0.7:
        end = 8 + int.from_bytes(data[:8], "little")
        header = mutated(data[8:end], rng)
        return len(header).to_bytes(8, "little") + header + data[end:]
    for _ in range(rng.randint(1, 3)):
        start = rng.randint(0, len(data) if rng.random() < 0.5 else min(len(data), 2000))
        stop = rng.choice([start, start + 20, len(data)])
        filling = rng.choice([b"", rng.randbytes(20), data[start:start + 20] * 2])
        word = WORD.search(data, start, start + 3000)
        if word and rng.random() < 0.3:
            (start, stop), filling = word.span(), rng.choice(ODD)
        data = data[:start] + filling + data[stop:]
    return data


def copied(story: Path, folder: Path) -> Path:
    """A new folder with the story and the toy's checkpoint."""
    shutil.copytree(story, folder)
    shutil.copytree(TOY, folder / "toy")
    return folder


@contextlib.contextmanager
def watched(case: str, seconds: int):
    """Ends the process after so many seconds. An error inside gets a note of the case."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    except BaseException as error:
        error.add_note(case)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


def targets(folder: Path, story: Path) -> list[tuple]:
    """(a file below `folder`, what reads it), after copying there all that it belongs to."""
    cpu, data, toy = torch.device("cpu"), folder / "data", copied(story, folder) / "toy"
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    encoders, image = sha256(*encoder_files(TOY)), data / "hate/images/00000_safe.png"
    weights = [path for path in sorted(toy.glob("*/*")) if path.parent.name != "judge"]
    tables = data / "test.jsonl", folder / "i2p.csv", folder / "coprov2.csv"
    return [*product(weights, [lambda path: load(toy, cpu)]),
            *product(tables, (read_prompts, read_requests)),
            (folder / "merged.safetensors", load_lora),
            (single_file("SD1", folder / "single/sd1.safetensors"), lambda path: load(path, cpu)),
            (folder / "c.json", read_concepts), (image, lambda path: read_images([path])),
            (image, lambda path: read_square(path, 16)),
            (data / "hate/pairs.jsonl", lambda path: read_pairs(data, "hate")),
            (data / "hate/latents.safetensors",
             lambda path: read_latents(data, ["hate"], encoders))]


def fuzz_files(cases: int, folder: Path, story: Path) -> int:
    """Damages files that a user may have, in the new folder `folder`. Returns how many were
    refused."""
    refused, files = 0, targets(folder, story)
    for case in range(cases):
        path, reader = files[case % len(files)]
        original, rng = path.read_bytes(), random.Random(case)
        path.write_bytes(mutated(original, rng, path.suffix == ".safetensors"))
        with watched(f"case {case}: {path}", 20):
            try:
                reader(path)
            except BadInput:
                refused += 1
        path.write_bytes(original)
    return refused


def flags_of(script):
    with mock.patch.object(argparse.ArgumentParser, "parse_args", lambda parser, argv: parser):
        actions = script.parse_arguments()._actions
    return [action for action in actions if action.dest not in ("help", "compile")]


def odd_flag(action: argparse.Action, rng: random.Random) -> list[str]:
    """A flag with values of its kind, or of another; sometimes with none, or twice."""
    words = list(action.option_strings[:1])
    if action.nargs != 0 and rng.random() < 0.92:
        for _ in range(rng.randint(1, 3) if action.nargs == "+" else 1):
            own = list(action.choices or VALUES.get(action.type, NUMBERS))
            words.append(rng.choice(rng.choice([own, own, STRANGE, PATHS, WORDS])))
    return words * 2 if rng.random() < 0.1 else words


def workplace(folder: Path, story: Path) -> dict:
    """Makes folder/work anew, where odd commands run. Returns its contents()."""
    shutil.rmtree(folder, ignore_errors=True)
    work = copied(story, folder / "work")
    shutil.copy(work / "data/hate/sheet.png", work)
    whole = (work / LORA).read_bytes()
    (work / "cut.safetensors").write_bytes(whole[:-100])
    (work / ODD_NAME).write_bytes(whole)
    os.mkfifo(work / "pipe")
    (work / "link").symlink_to("nowhere")
    os.chdir(work)
    return contents(folder)


def contents(folder: Path):
    """{path: hash} of all files and folders below."""
    return {path: sha256(path) if path.is_file() else "" for path in folder.rglob("*")}


def called(script, argv: list[str]):
    """(exit status, error lines) of one command, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(script.main, script.parse_arguments(argv))
            status = 0
        except SystemExit as stop:
            status = stop.code
    err.seek(0)
    return status, re.findall(r"(?m)^error: .*", err.read().replace("\r", "\n"))


def fuzz_commands(cases: int, folder: Path, story: Path) -> int:
    """Runs commands below the new folder `folder`. Returns how many were refused."""
    refused, here, before = 0, Path.cwd(), workplace(folder, story)
    scripts = [(script, line, flags_of(script)) for script, line in SCRIPTS.items()]
    for case in range(cases):
        rng = random.Random(case)
        script, line, flags = scripts[case % len(scripts)]
        argv = line.split()
        for _ in range(rng.randint(1, 3)):
            argv += odd_flag(rng.choice(flags), rng)
        with watched(f"case {case}: {script.__name__} {argv}", 300):
            status, errors = called(script, argv)
            after = contents(folder)
            assert (status, len(errors)) in ((0, 0), (2, 1)), (status, errors)
            assert status == 0 or after == before or LATE.search(errors[0]), errors
        refused += status == 2
        if after != before:
            before = workplace(folder, story)
    os.chdir(here)
    return refused
