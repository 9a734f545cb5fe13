"""A real CLIP tokenizer for a small closed vocabulary, written as four files.

Needs   nothing but a list of words.
Gives   a tokenizer/ folder that transformers, diffusers and every other CLIP reader opens, in which each
        given word is one token, and any other text still works, falling back to pieces and then bytes.

How CLIP cuts text: lower-case; split into runs of letters, single digits and runs of other signs (so
"self-harm" is always self + - + harm, whatever the merges say); write each run as UTF-8 bytes, one visible
symbol a byte, the last one marked </w>; then, while any neighbouring pair is in merges.txt, join the pair that
stands earliest in the file (byte-pair encoding, Sennrich et al. 2016, 1508.07909).
"""

import json
import os
import re

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """The 256 visible symbols that stand for the bytes, in CLIP's vocabulary order (GPT-2's table): printable
    Latin-1 bytes are themselves and come first; the others, which a text file could not show, are U+0100 up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def bpe(pieces: list[str], ranks: dict) -> list[str]:
    """Join pairs of pieces, the lowest rank first, all its places at once, until none is in ranks."""
    while True:
        known = [pair for pair in zip(pieces, pieces[1:]) if pair in ranks]
        if not known:
            return pieces
        best, joined, i = min(known, key=ranks.get), [], 0
        while i < len(pieces):
            step = 2 if tuple(pieces[i:i + 2]) == best else 1
            joined.append("".join(pieces[i:i + step]))
            i += step
        pieces = joined


def write_tokenizer(folder: str, words: list[str], length: int) -> int:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json into folder.

    words: each becomes ONE token (a hyphenated one, a token for each part: see above). ASCII letters, else
        ValueError. The same words in the same order give the same bytes. length: tokens a prompt, with both ends.
    Returns the vocabulary size V: ids 0..255 bytes, 256..511 bytes that end a word, then one for each merge,
    V−2 start, V−1 end of text, which also pads: the text encoder's bos, eos and pad ids.
    """
    # A word's merges cannot be listed alone: "ca" from "cat" would break up "s-c-ar". So each word is first cut
    # by all earlier merges, and only the pieces that are left get new ones. Those rank behind, so they are
    # never tried before an earlier word is whole, and no earlier word changes.
    ranks = {}
    for word in words:
        parts = word.lower().split("-")
        if not all(re.fullmatch("[a-z]+", part) for part in parts):
            raise ValueError(f"{word!r} is not a word of letters a to z (with hyphens); change it in the word list")
        for part in parts:
            pieces = [*part[:-1], part[-1] + "</w>"]
            while len(pieces := bpe(pieces, ranks)) > 1:
                ranks[pieces[0], pieces[1]] = len(ranks)

    symbols = byte_symbols()
    tokens = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in ranks] + [START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}  # two merges may build the same piece
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}

    os.makedirs(folder, exist_ok=True)
    files = {"vocab.json": json.dumps(vocab, ensure_ascii=False),
             "merges.txt": "\n".join(["#version: 0.2"] + [f"{a} {b}" for a, b in ranks]),  # readers skip line 1
             "tokenizer_config.json": json.dumps(config, indent=2),
             "special_tokens_map.json": json.dumps(special, indent=2)}
    for name, text in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8", newline="\n") as file:
            file.write(text + "\n")
    return len(vocab)
