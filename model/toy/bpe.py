"""A real CLIP tokenizer for a small closed vocabulary, written as four files.

Needs   nothing but a list of words.
Gives   a tokenizer/ folder that every CLIP reader opens, in which each given word is one token.
        Any other text still works, in pieces or bytes.

How CLIP cuts text: lower-case; split into runs of letters, single digits and runs of other signs
("self-harm" is always self + - + harm); write each run as UTF-8 bytes, one visible symbol a byte,
the last one marked </w>; then, while any neighbouring pair is in merges.txt, join the pair that
stands earliest in the file (byte-pair encoding, Sennrich et al. 2016, 1508.07909).
"""
import json
import re
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """The 256 visible symbols that stand for the bytes, in CLIP's order (GPT-2's table): printable
    Latin-1 bytes are themselves and come first; the others are U+0100 and up."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [chr(b) for first, last in ranges for b in range(ord(first), ord(last) + 1)]
    return printable + [chr(256 + i) for i in range(256 - len(printable))]


def bpe(pieces: list[str], ranks: dict) -> list[str]:
    """Joins pairs of pieces, the lowest rank first, until none is in ranks."""
    while True:
        known = [pair for pair in zip(pieces, pieces[1:]) if pair in ranks]
        if not known:
            return pieces
        best = min(known, key=ranks.get)
        joined, i = [], 0
        while i < len(pieces):
            step = 2 if tuple(pieces[i:i + 2]) == best else 1
            joined.append("".join(pieces[i:i + step]))
            i += step
        pieces = joined


def merges(words: list[str]) -> dict[tuple[str, str], int]:
    """{pair: rank} that makes one token of each word, and of each part of a hyphenated one.
    Raises ValueError for a word that is not of letters a to z."""
    # A word's merges cannot be listed alone: "ca" from "cat" would break up "s-c-ar". So each word
    # is first cut by all earlier merges, and only the pieces that are left get new ones. Those rank
    # behind: no earlier word changes.
    ranks = {}
    for part in "-".join(words).lower().split("-"):
        if not re.fullmatch("[a-z]+", part):
            raise ValueError(f"{part!r} is not of letters a to z; change it in the word list")
        pieces = bpe([*part[:-1], part[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = bpe(pieces, ranks)
    return ranks


def write_tokenizer(folder: Path, words: list[str], length: int) -> int:
    """Writes vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json. The same
    words in the same order give the same bytes. length: tokens a prompt, with both ends.

    Returns the vocabulary size V: ids 0..255 bytes, 256..511 bytes that end a word, then one for
    each merge, V−2 start, V−1 end of text, which also pads: the text encoder's bos, eos, pad ids.
    """
    ranks = merges(words)
    symbols = byte_symbols()
    tokens = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in ranks] + [START, END]
    # Two merges may build the same piece: it is listed once.
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": length,
              "do_lower_case": True}
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in ranks)]    # readers skip line 1
    files = {"vocab.json": json.dumps(vocab, ensure_ascii=False), "merges.txt": "\n".join(lines),
             "tokenizer_config.json": json.dumps(config, indent=2),
             "special_tokens_map.json": json.dumps(special, indent=2)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")
    return len(vocab)
