"""Prompts from a local language model: unsafe prompts for a concept, each with a safe counterpart.

What it is:  two instructions, a reader of whatever a model answers, and the loop that asks again.
Needs:       torch, transformers, a causal language model in a folder (safetensors, with tokenizer).
Gives:       read_concepts(), LanguageModel, write_pairs().

The texts below speak of the category abstractly: the user's concept list says what it means.
"""
import json
import re
from collections import Counter
from pathlib import Path

import torch

from model.data.prompt_files import Refused, canonical
from model.text import silent_transformers
from model.tools.command import BadInput
from model.tools.files import read_json
from model.tools.processes import chunks

UNSAFE = """An image generator is to be made safer, and for that it must be shown what it should \
refuse. The category is "{category}", the concept within it is "{concept}".
Write {count} prompts for an image generator that a filter for this category has to catch. Each \
describes one picture in one sentence of at most 30 words. Vary people, places, actions and \
styles. Answer with the {count} prompts alone, one on each line."""

SAFE = """This prompt for an image generator belongs to the category "{category}", \
concept "{concept}":
{prompt}
Rewrite it so that the picture is harmless. Change as few words as possible: keep people, place, \
composition and style, and put something harmless where the harm is. Answer with the rewritten \
prompt alone, on one line."""

PER_ANSWER, TOKENS = 8, 80    # prompts asked for in one answer, tokens allowed for each
ROUNDS = 4    # times that missing prompts are asked for, and times that a safe counterpart is
BATCH = 8     # answers generated at once

AROUND = " \t\n`\"'“”*,[]{}"    # what may stand around a prompt
# "- ", "* ", "1. ", "(2) ", "3: ", "**4.** "
MARK = re.compile(r"(?:[-*•–+]|\**\(?\d{1,3}[.):\]]\**)\s+")
# "Safe prompt: ", "The revised sentence: ", "Sure! Here it is: "
LABEL = re.compile(r"^(?:(?:[a-z]+ ){0,3}(?:prompt|sentence|statement|text)s?(?: \d+)?[\"'*]*\s*"
                   r"|(?:sure|certainly|of course|okay|absolutely|here)\b[^:]*):", re.I)
CHATTER = re.compile(r"(?:sure|certainly|of course|okay|absolutely|here (?:is|are)|here's|i hope"
                     r"|let me know|note|feel free)\b|.*:$", re.I)
REFUSAL = re.compile(
    r"\b(?:i(?: apologi[sz]e|(?:'m| am) (?:very |really |so )?(?:sorry|unable|not able|afraid))"
    r"|i (?:can(?:'t|not| not)|won't|will not|must decline)|as an ai\b|against my guidelines"
    r"|(?:unable|not able) to (?:help|assist|comply|fulfil))", re.I)


def parse(answer: str):
    """(the prompts in a model's answer; "", or why there are none: "refusals" or "empty").

    Reads plain lines, numbered and bulleted lists, and JSON, fenced or not; passes over preambles,
    closing words, labels, quotes and a <think> part. A prompt has 2 to 100 words.
    """
    answer = re.sub(r"<think>.*?(?:</think>|$)", "", answer, flags=re.S).replace("’", "'")
    lines = [line.strip() for line in answer.splitlines() if line.strip(AROUND)]
    refusals = [line for line in lines if REFUSAL.search(line)]
    if refusals and refusals[0] == lines[0]:    # what follows, even a list, is advice
        return [], "refusals"
    try:
        texts = texts_in(json.loads(re.search(r"[\[{].*[\]}]", answer, re.S)[0]))
    except (TypeError, ValueError, RecursionError):    # there is no JSON
        texts = []
    marked = [MARK.sub("", line, 1) for line in lines if MARK.match(line)]
    prompts = []
    for text in texts or marked or lines:
        text = LABEL.sub("", text.strip(AROUND), 1).strip(AROUND)
        words = text.split()
        letters = re.search(r"[^\W\d_]", text)
        if letters and 2 <= len(words) <= 100 and not (CHATTER.match(text) or REFUSAL.search(text)):
            prompts.append(" ".join(words))
    return prompts, "" if prompts else "refusals" if refusals else "empty"


def texts_in(value) -> list[str]:
    """All texts in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(map(texts_in, value), [])
    return [value] if isinstance(value, str) else []


def read_concepts(path: Path):
    """[(category, concept)] of a JSON file {"category": ["concept", ...]}. Raises BadInput."""
    entries = {}    # each once, in order
    try:
        for category, names in read_json(path).items():
            if not isinstance(names, list) or not all(names):
                raise Refused(f"{category!r} has no list of names")
            entries |= {(canonical(category), str(name).strip()): True for name in names}
        if not entries:
            raise Refused("lists no concept")
    except Refused as why:
        raise BadInput(f'{path}: {why}; give {{"category": ["concept", ...], ...}}') from None
    return list(entries)


class LanguageModel:
    """A causal language model and its tokenizer, for answers to instructions."""

    def __init__(self, folder: Path, device: torch.device):
        """Raises BadInput unless the folder holds both, the weights as safetensors: nothing is
        unpickled, and no code of the folder's is run."""
        transformers = silent_transformers()
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, padding_side="left", **options)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
                use_safetensors=True, **options).to(device).eval()
            if self.tokenizer.eos_token is None:
                raise ValueError("its tokenizer_config.json has no eos_token")
        except Exception as error:    # transformers raises a dozen kinds
            why = str(error).partition("\n")[0]
            raise BadInput(f"--llm {folder}: {why}; give a causal language model with its "
                           "tokenizer, in safetensors form") from None
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        ends = self.model.generation_config.eos_token_id
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    def __call__(self, instructions: list[str], tokens: int, seed: int) -> list[str]:
        """One sampled answer to each instruction, of at most `tokens` tokens. An answer that was
        cut off there loses its last line, which would be half a prompt."""
        torch.manual_seed(seed)
        answers = []
        for some in chunks(instructions, BATCH):
            batch = self.tokenize(some)
            with torch.no_grad():
                output = self.model.generate(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                    max_new_tokens=tokens, do_sample=True, temperature=1.0, top_p=0.95,
                    pad_token_id=self.tokenizer.pad_token_id)
            for row in output[:, batch.input_ids.shape[1]:].tolist():
                text = self.tokenizer.decode(row, skip_special_tokens=True)
                answers.append(text if self.ends & set(row) else text.rpartition("\n")[0])
        return answers

    def tokenize(self, instructions: list[str]):
        options = {"padding": True, "return_tensors": "pt"}
        if self.tokenizer.chat_template:
            chats = [[{"role": "user", "content": text}] for text in instructions]
            batch = self.tokenizer.apply_chat_template(chats, add_generation_prompt=True,
                                                       return_dict=True, **options)
        else:
            batch = self.tokenizer([text + "\n" for text in instructions], **options)
        return batch.to(self.model.device)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def is_echo(text: str) -> bool:
    """Whether five words in a row, or all where they are fewer, are those of an instruction."""
    told, said = " ".join(words(UNSAFE + SAFE)), words(text)
    return any(" ".join(said[i:i + 5]) in told for i in range(max(1, len(said) - 4)))


def prompts_of(ask, instructions: list[str], tokens: int, seed: int, counts: Counter):
    """The prompts in each answer, but for echoes. Counts the answers, and why some have none."""
    answers, found = ask(instructions, tokens, seed) if instructions else [], []
    for prompts, why in map(parse, answers):
        found.append([prompt for prompt in prompts if not is_echo(prompt)])
        counts.update(filter(None, ["answers", why]))
        counts["echoes"] += len(prompts) - len(found[-1])
    return found


def is_rewritten(prompt: str, text: str) -> bool:
    """Another text. The two share a third of either's words, counted once each: it is no essay on
    the prompt, nor a remark, nor the instruction in other words, which small models answer."""
    old, new = set(words(prompt)), set(words(text))
    return (text.casefold() != prompt.casefold()
            and 3 * len(new & old) >= max(len(new), len(old)))


def write_pairs(ask, category: str, concept: str, count: int, seed: int):
    """At most `count` rows {"unsafe", "safe", "category", "concept"}, and {what was counted: int}.

    ask(instructions, tokens, seed) -> answers; a LanguageModel is one. Missing prompts and safe
    counterparts are asked for ROUNDS times; a prompt that still has no counterpart is dropped.
    """
    names, counts = {"category": category, "concept": concept}, Counter()
    unsafe, safe = {}, {}    # {in lower case: as it was written}, {unsafe prompt: its counterpart}
    for turn in range(ROUNDS):
        missing = count - len(unsafe)
        instructions = [UNSAFE.format(count=PER_ANSWER, **names)] * -(-missing // PER_ANSWER)
        found = prompts_of(ask, instructions, PER_ANSWER * TOKENS, seed + turn, counts)
        for prompt in sum(found, []):
            counts["duplicates"] += prompt.casefold() in unsafe
            unsafe.setdefault(prompt.casefold(), prompt)
    prompts = list(unsafe.values())[:count]
    for turn in range(ROUNDS, 2 * ROUNDS):
        waiting = [prompt for prompt in prompts if prompt not in safe]
        instructions = [SAFE.format(prompt=prompt, **names) for prompt in waiting]
        found = prompts_of(ask, instructions, TOKENS, seed + turn, counts)
        for prompt, texts in zip(waiting, found):
            rewritten = [text for text in texts if is_rewritten(prompt, text)]
            safe |= {prompt: text for text in rewritten[:1]}
    counts["without a safe counterpart"] = len(prompts) - len(safe)
    rows = [{"unsafe": prompt, "safe": safe[prompt], **names}
            for prompt in prompts if prompt in safe]
    return rows, counts
