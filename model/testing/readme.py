"""Does the README tell the truth? `python -m model.testing.readme`, some ten minutes.

What it is:  in a fresh clone of what is committed, runs the README's bash blocks whose output is
             shown, in order, and asks whether they print each line that is shown, but for "…". Such
             a block is followed, after at most 1500 characters, by one without a language. Of its
             commands those that start with "python" are run, by this Python.
Gives:       SHOWN, commands_of(), for the tests.
"""
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from model.tools.command import BadInput, PlainParser, run

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SHOWN = re.compile(r"^```bash\n((?:(?!```).)*)^```$((?:(?!```).){,1500})^```\n(.*?)^```$",
                   re.M | re.S)
INLINE = re.compile(r"`((?:(?:python3?|pip|torchrun|pytest test_all\.py)\s|-k\s)[^`]+)`")


def parse_arguments(argv=None):
    return PlainParser("Runs the README's commands and compares what they print with what it "
                       "shows.").parse_args(argv)


def commands_of(readme: str) -> list[str]:
    """Each command once: those of bash blocks, split at &&, and those in the text, -k ... too."""
    scripts = [text for language, text in BLOCK.findall(readme) if language == "bash"]
    lines = "".join(scripts).replace("\\\n", " ").splitlines()
    lines += INLINE.findall(BLOCK.sub("", readme))
    parts = [part for line in lines for part in line.partition("  #")[0].split("&&")]
    return list(dict.fromkeys(" ".join(part.split()) for part in parts if part.strip()))


def printed(commands: list[str], folder: str) -> list[str]:
    """The lines that these commands print, one after the other."""
    lines = []
    for command in commands:
        started = time.time()
        script = shlex.quote(sys.executable) + command.removeprefix("python")
        done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise BadInput(f"{command}: exit status {done.returncode}, {done.stderr[-300:]}")
        print(f"{time.time() - started:6.0f} s  {command}", flush=True)
        lines += done.stdout.splitlines()
    return lines


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        missing, blocks = [], SHOWN.findall((Path(folder) / "README.md").read_text())
        if not blocks:
            raise BadInput("README.md: shows no output; put a block below its command")
        for script, _, output in blocks:
            commands = commands_of(f"```bash\n{script}```\n")
            lines = printed([part for part in commands if part.startswith("python ")], folder)
            missing += [line for line in output.splitlines() if line not in (*lines, "…")]
    for line in missing:
        print(f"not printed: {line}")
    print(f"{len(missing)} lines of the README were not printed by its commands")
    sys.exit(bool(missing))


if __name__ == "__main__":
    run(main, parse_arguments())
