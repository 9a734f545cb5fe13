"""Prompts from a local language model: unsafe prompts for a concept, each with a safe counterpart.

What it is:  two instructions, a reader of whatever a model answers, and the loop that asks again.
Needs:       torch, transformers, a causal language model in a folder (safetensors, with tokenizer).
Gives:       read_concepts(), LanguageModel, write_pairs().

The texts below speak of the category abstractly: the user's concept list says what it means.
"""
import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import torch

from model.data.prompt_files import Refused, canonical
from model.tools.command import BadInput
from model.tools.files import read_json

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

# "- ", "* ", "1. ", "(2) ", "3: ", "**4.** "
MARK = re.compile(r"(?:[-*•–+]|\**\(?\d{1,3}[.):\]]\**)\s+")
# "Safe prompt: "
LABEL = re.compile(r"""^["'*]*(?:[a-z]+ ){0,3}prompts?(?: \d+)?["'*]*\s*:["'*]*\s*""", re.I)
# "Sure! Here it is: "
OPENING = re.compile(r"^(?:sure|certainly|of course|okay|absolutely|here)\b[^:]*:\s*", re.I)
AROUND = " \t\n`\"'“”*,[]{}"    # what may stand around a prompt
CHATTER = re.compile(r"(?:sure|certainly|of course|okay|absolutely|here (?:is|are)|here's|i hope"
                     r"|let me know|note|feel free)\b", re.I)
REFUSAL = re.compile(
    r"\b(?:i(?: apologi[sz]e|(?:'m| am) (?:very |really |so )?(?:sorry|unable|not able|afraid))"
    r"|i (?:can(?:'t|not| not)|won't|will not|must decline)|as an ai\b|against my guidelines"
    r"|(?:unable|not able) to (?:help|assist|comply|fulfil))", re.I)


def parse(answer: str) -> tuple[list[str], str]:
    """(the prompts in a model's answer; "", or why there are none: "refusals" or "empty").

    Reads plain lines, numbered and bulleted lists, and JSON, fenced or not; passes over preambles,
    closing words, labels, quotes and a <think> part. A prompt has 2 to 100 words.
    """
    answer = re.sub(r"<think>.*?(?:</think>|$)", "", answer, flags=re.S).replace("’", "'").strip()
    lines = [line.strip() for line in answer.splitlines() if line.strip(AROUND)]
    lines = [line for line in lines if not line.startswith("```")]
    if lines and REFUSAL.search(lines[0]):    # what follows, even a list, is advice
        return [], "refusals"
    prompts = []
    for text in json_texts(answer) or listed(lines):
        text = " ".join(LABEL.sub("", text.strip(AROUND)).strip(AROUND).split())
        long_enough = len(re.findall(r"[^\W\d_]+", text)) >= 2 and len(text.split()) <= 100
        if long_enough and not text.endswith(":") and not REFUSAL.search(text):
            prompts.append(text)
    refused = any(REFUSAL.search(line) for line in lines)
    return prompts, "" if prompts else "refusals" if refused else "empty"


def listed(lines: list[str]) -> list[str]:
    """The items of a list if there is one, else all lines; without what was said around them."""
    marked = [MARK.sub("", line, count=1) for line in lines if MARK.match(line)]
    texts = marked or [OPENING.sub("", line) for line in lines]
    return [text for text in texts if not CHATTER.match(text)]


def json_texts(answer: str) -> list[str]:
    """All texts in the JSON between an answer's first and last bracket, if it is JSON."""
    match = re.search(r"[\[{].*[\]}]", answer, re.S)
    try:
        values, texts = [json.loads(match[0])] if match else [], []
    except (ValueError, RecursionError):
        return []
    while values:
        value = values.pop(0)
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            values = [*value.values(), *values]
        elif isinstance(value, list):
            values = [*value, *values]
    return texts


def is_name(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def read_concepts(path: Path) -> list[tuple[str, str]]:
    """[(category, concept)] of a JSON file {"category": ["concept", ...]}. Raises BadInput."""
    entries = []
    try:
        for category, names in read_json(path).items():
            if not isinstance(names, list) or not all(map(is_name, names)):
                raise Refused(f"{category!r} has no list of names")
            entries += [(canonical(category), name.strip()) for name in names]
        if not entries:
            raise Refused("lists no concept")
    except Refused as why:
        raise BadInput(f'{path}: {why}; give {{"category": ["concept", ...], ...}}') from None
    return list(dict.fromkeys(entries))


class LanguageModel:
    """A causal language model and its tokenizer, for answers to instructions."""

    def __init__(self, folder: Path, device: torch.device):
        """Raises BadInput unless the folder holds both, the weights as safetensors: nothing is
        unpickled, and no code of the folder's is run."""
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if not folder.is_dir():
            raise BadInput(f"--llm {folder}: no such folder; give a causal language model as "
                           "transformers saves it")
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, padding_side="left", **options)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
                use_safetensors=True, **options).to(device).eval()
        except Exception as error:    # transformers raises a dozen kinds
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise BadInput(f"--llm {folder}: {why}; give a causal language model in safetensors "
                           "form with its tokenizer") from None
        if self.tokenizer.eos_token is None:
            raise BadInput(f"--llm {folder}: knows no end-of-text token; set eos_token in its "
                           "tokenizer_config.json")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        ends = self.model.generation_config.eos_token_id
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    def __call__(self, instructions: list[str], tokens: int, seed: int) -> list[str]:
        """One sampled answer to each instruction, of at most `tokens` tokens. An answer that was
        cut off there loses its last line, which would be half a prompt."""
        torch.manual_seed(seed)
        answers = []
        for start in range(0, len(instructions), BATCH):
            batch = self.tokenize(instructions[start:start + BATCH])
            with torch.no_grad():
                output = self.model.generate(**batch, do_sample=True, temperature=1.0, top_p=0.95,
                                             max_new_tokens=tokens,
                                             pad_token_id=self.tokenizer.pad_token_id)
            for row in output[:, batch["input_ids"].shape[1]:].tolist():
                text = self.tokenizer.decode(row, skip_special_tokens=True)
                answers.append(text if self.ends & set(row) else text.rpartition("\n")[0])
        return answers

    def tokenize(self, instructions: list[str]) -> dict[str, torch.Tensor]:
        chat = bool(self.tokenizer.chat_template)
        if chat:    # the template brings its own special tokens
            texts = [self.tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                                        tokenize=False, add_generation_prompt=True)
                     for text in instructions]
        else:
            texts = [text + "\n" for text in instructions]
        return self.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False,
                              add_special_tokens=not chat).to(self.model.device)


def prompts_in(answers: list[str], counts: Counter) -> list[list[str]]:
    """The prompts of each answer. Counts the answers, and why some have none."""
    found = []
    for answer in answers:
        prompts, why = parse(answer)
        counts.update(["answers", why] if why else ["answers"])
        found.append(prompts)
    return found


def write_pairs(ask, category: str, concept: str, count: int, seed: int) -> tuple[list[dict], dict]:
    """At most `count` rows {"unsafe", "safe", "category", "concept"}, and {what was counted: int}.

    ask(instructions, tokens, seed) -> answers; a LanguageModel is one. Missing prompts and safe
    counterparts are asked for ROUNDS times; a prompt that still has no counterpart is dropped.
    """
    names = {"category": category, "concept": concept}
    counts = Counter({"answers": 0, "refusals": 0, "empty": 0, "duplicates": 0})
    unsafe: dict[str, str] = {}    # in lower case -> as it was written
    for turn in range(ROUNDS):
        missing = count - len(unsafe)
        if missing <= 0:
            break
        instructions = [UNSAFE.format(count=PER_ANSWER, **names)] * -(-missing // PER_ANSWER)
        answers = ask(instructions, PER_ANSWER * TOKENS, seed + turn)
        for prompt in chain(*prompts_in(answers, counts)):
            counts["duplicates"] += prompt.casefold() in unsafe
            unsafe.setdefault(prompt.casefold(), prompt)
    prompts, safe = list(unsafe.values())[:count], {}
    for turn in range(ROUNDS, 2 * ROUNDS):
        waiting = [prompt for prompt in prompts if prompt not in safe]
        if not waiting:
            break
        instructions = [SAFE.format(prompt=prompt, **names) for prompt in waiting]
        answers = ask(instructions, TOKENS, seed + turn)
        for prompt, texts in zip(waiting, prompts_in(answers, counts)):
            others = [text for text in texts if text.casefold() != prompt.casefold()]
            if others:
                safe[prompt] = others[0]
    counts["without a safe counterpart"] = len(prompts) - len(safe)
    rows = [{"unsafe": prompt, "safe": safe[prompt], **names}
            for prompt in prompts if prompt in safe]
    return rows, dict(counts)
