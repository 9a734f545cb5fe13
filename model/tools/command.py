"""A command line: its flags, and errors of one line.

Gives:       BadInput, run(); PlainParser, Parser, GeneratingParser; and types of flags, which
             refuse what makes no sense: positive_int, natural_int, fraction, open_fraction,
             positive_float, auto_or_positive, finite_float, at_strength; named(), for a flag that
             names a function; check_read().
"""
import argparse
import inspect
import math
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

from model.tools.memory import keep_memory

TOY = Path(__file__).parents[1] / "toy"    # the default model
LARGEST = 2 ** 32 - 1    # count or seed: what other programs take as a seed


class BadInput(Exception):
    """Something the user gave is wrong. The message names file and value, and says how to fix
    it."""


def named(flag: str, name: str, table: dict) -> Callable:
    """The function of this name in the table {name: function, or its dotted name}, or else of this
    dotted name: one that takes as many arguments as the table's, or a class. Raises BadInput."""
    found, like = table.get(name, name), next(filter(callable, table.values()))
    try:
        found = found if callable(found) else pkgutil.resolve_name(found)
        wanted, given = (len(inspect.signature(f).parameters) for f in (like, found))
        if given == wanted or isinstance(found, type):
            return found
        reason = f"it takes {given} arguments, not {wanted}"
    except TypeError:
        reason = "it is not a function"
    except (ImportError, AttributeError, ValueError) as error:
        reason = error
    raise BadInput(f"{flag} {name}: {reason}; use {' or '.join(table)}, or the dotted name of a "
                   "function")


def check_read(flag: str, value, method: str, readers: tuple[str, ...]):
    """Raises BadInput for a flag that was given, and that this --method does not read. What a
    dotted name reads is not known."""
    if value is not None and method not in readers and "." not in method:
        raise BadInput(f"{flag}: --method {method} does not read it; leave it out, or use --method "
                       f"{' or '.join(readers)}")


def whole(text: str, least: int) -> int:
    if not text.removeprefix("-").isdecimal() or not least <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from {least} to {LARGEST}; give one")
    return int(text)


def positive_int(text: str) -> int:
    return whole(text, 1)


def natural_int(text: str) -> int:
    return whole(text, 0)


def finite_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 1e38:    # what fp32 can hold
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number; give one such as 0.5")
    return value


def positive_float(text: str) -> float:
    if finite_float(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0; give a positive number")
    return float(text)


def auto_or_positive(text: str) -> float | str:
    return text if text == "auto" else positive_float(text)


def fraction(text: str) -> float:
    if not 0 <= finite_float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share; give a number from 0 to 1")
    return float(text)


def open_fraction(text: str) -> float:
    if fraction(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} leaves nothing; give a number above 0, up to 1")
    return float(text)


def at_strength(text: str):
    """ "style.safetensors@0.5" -> (path, 0.5); without the @, strength 1. A file's name may have an
    @ too."""
    name, at, strength = text.rpartition("@")
    if not at or os.path.exists(text):
        return Path(text), 1.0
    try:
        return Path(name), finite_float(strength)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r}: no such file, and {strength!r} is not a "
                                         "finite number; give FILE or FILE@0.5") from None


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends to the help the defaults that it does not say; but for None, False and an empty
    list."""

    def _get_help_string(self, action):
        unsaid = action.default and "(default" not in action.help
        return super()._get_help_string(action) if unsaid else action.help


class PlainParser(argparse.ArgumentParser):
    """argparse with errors of one line, and no flag by half its name."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=Help)

    def error(self, message):
        sys.exit(complain(message + "; see --help"))


class Parser(PlainParser):
    """With the flags that all scripts take."""

    def __init__(self, description: str):
        super().__init__(description)
        add = self.add_argument
        add("--model", type=Path, default=TOY, help="Stable Diffusion 1, 2 or XL: a diffusers "
            "folder or one .safetensors file (default: the embedded toy)")
        add("--seed", type=natural_int, default=0, help="of everything random (default: 0)")
        add("--device", default="auto", help="torch device; auto is cuda, then mps, then cpu")
        add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the "
            "frozen model's numbers; auto is bf16 on a GPU (fp16 where it lacks bf16), else fp32. "
            "LoRAs and losses are fp32 always")


class GeneratingParser(Parser):
    """With the flags of scripts that generate images."""

    def __init__(self, description: str):
        super().__init__(description)
        add = self.add_argument
        add("--steps", type=positive_int, help="sampling steps (default: toy 10, else 25)")
        add("--guidance", type=finite_float,
            help="classifier-free guidance, 1 is none (default: toy 3, else 7.5)")
        add("--negative", default="", help="what guidance steers away from, a prompt")
        add("--size", type=positive_int,
            help="an image's side in pixels (default: the model's own)")
        add("--batch", type=positive_int, help="images generated at once (default: 16 up to 256 "
            "px, 4 at 512 px, 1 at 1024 px)")


def complain(message: str) -> int:
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return 2


def run(main, args):
    """Runs a script. Bad input is one line on stderr and exit status 2; Ctrl-C is exit status
    130."""
    sys.stdout.reconfigure(errors="backslashreplace")    # some file names cannot be printed
    keep_memory()
    try:
        main(args)
    except BadInput as error:
        sys.exit(complain(error))
    except (MemoryError, RuntimeError) as error:    # torch's, on a CPU too, is a RuntimeError
        text = str(error).lower()
        if "out of memory" not in text and "allocate memory" not in text:
            raise
        sys.exit(complain("no memory left; use a smaller --batch or --size (train.py: --accumulate "
                          "and --checkpointing)"))
    except OSError as error:    # a read-only folder, a full disk
        sys.exit(complain(f"{error.filename or 'a file'}: {error.strerror or error}; "
                          "check the path, its rights and the space left"))
    except KeyboardInterrupt:
        sys.exit(130)
