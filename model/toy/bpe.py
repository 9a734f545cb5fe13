"""A real CLIP tokenizer for a small closed vocabulary, written as four files.

Needs   tokenizers, which comes with transformers; a list of words.
Gives   a tokenizer/ folder that every CLIP reader opens, in which each given word is one token.
        Any other text still works, in pieces or bytes.

How CLIP cuts text: lower-case; split into runs of letters, single digits and runs of other signs
("self-harm" is always self + - + harm); write each run as UTF-8 bytes, one visible symbol a byte,
the last one marked </w>; then, while any neighbouring pair is in merges.txt, join the pair that
stands earliest in the file (byte-pair encoding, Sennrich et al. 2016, 1508.07909).
"""
import json
from pathlib import Path

from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary(merges):
    """{token: id}: 0..255 bytes, 256..511 bytes that end a word, then one for each merge, V-2
    start, V-1 end of text, which also pads: the text encoder's bos, eos and pad ids."""
    symbols = sorted(ByteLevel.alphabet())    # CLIP's order: printable Latin-1 comes first
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
    # Two merges may build the same piece: it is listed once.
    return {token: i for i, token in enumerate(dict.fromkeys([*tokens, START, END]))}


def pieces_of(word: str, merges) -> list[str]:
    model = BPE(vocabulary(merges), merges, end_of_word_suffix="</w>")
    return [token.value for token in model.tokenize(word)]


def merges_for(words: list[str]):
    """Those (piece, piece) that make one token of each word of letters a to z, and of each part of
    a hyphenated one."""
    # A word's merges cannot be listed alone: "ca" from "cat" would break up "s-c-ar". So each word
    # is first cut by all earlier merges, and only the pieces that are left get new ones. Those rank
    # behind: no earlier word changes.
    merges = []
    for part in "-".join(words).lower().split("-"):
        while len(pieces := pieces_of(part, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    return merges


def write_tokenizer(folder: Path, words: list[str], length: int) -> dict[str, int]:
    """Writes vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json. The same
    words in the same order give the same bytes. length: tokens a prompt, with both ends. Returns
    what a text encoder's config says of them."""
    merges = merges_for(words)
    vocab = vocabulary(merges)
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": length,
              "do_lower_case": True}
    lines = ["#version: 0.2", *map(" ".join, merges)]    # readers skip line 1
    files = {"vocab.json": json.dumps(vocab, ensure_ascii=False), "merges.txt": "\n".join(lines),
             "tokenizer_config.json": json.dumps(config, indent=2),
             "special_tokens_map.json": json.dumps(special, indent=2)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")
    return {"vocab_size": len(vocab), "bos_token_id": vocab[START], "eos_token_id": vocab[END],
            "pad_token_id": vocab[END]}
