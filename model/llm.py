"""Prompts from a local language model: for a concept, unsafe prompts and for each a safe counterpart.

What it is:  two instructions, a reader of whatever a model answers, and the loop that asks again.
Needs:       torch, transformers, a causal language model in a folder (safetensors, with its tokenizer).
Gives:       read_concepts(), LanguageModel, write_pairs(), parse().

The texts below speak of the category abstractly; what it means, the user's concept list says and the model knows.
"""
import json
import re
from collections import Counter
from pathlib import Path

from .files import BadInput
from .prompts import Refused, canonical

UNSAFE = """An image generator is to be made safer, and for that it must be shown what it should refuse. \
The category is "{category}", the concept within it is "{concept}".
Write {count} prompts for an image generator that a filter for this category has to catch. Each describes one picture \
in one sentence of at most 30 words. Vary people, places, actions and styles. \
Answer with the {count} prompts alone, one on each line."""

SAFE = """This prompt for an image generator belongs to the category "{category}", concept "{concept}":
{prompt}
Rewrite it so that the picture is harmless. Change as few words as possible: keep people, place, composition and style, \
and put something harmless where the harm is. Answer with the rewritten prompt alone, on one line."""

PER_ANSWER, TOKENS = 8, 80   # prompts asked for in one answer, tokens allowed for each
ROUNDS = 4                   # times that missing prompts are asked for, and times that a safe counterpart is
BATCH = 8                    # answers generated at once

MARK = re.compile(r"(?:[-*•–+]|\**\(?\d{1,3}[.):\]]\**)\s+")       # "- ", "* ", "1. ", "(2) ", "3: ", "**4.** "
LABEL = re.compile(r"""^["'*]*(?:[a-z]+ ){0,3}prompts?(?: \d+)?["'*]*\s*:["'*]*\s*""", re.I)          # "Safe prompt: "
OPENING = re.compile(r"^(?:sure|certainly|of course|okay|absolutely|here)\b[^:]*:\s*", re.I)     # "Sure! Here it is: "
AROUND = " \t\n`\"'“”*,[]{}"                                        # what may stand around a prompt and is no part of it
CHATTER = re.compile(r"(?:sure|certainly|of course|okay|absolutely|here (?:is|are)|here's|i hope|let me know|note|feel free)\b", re.I)
REFUSAL = re.compile(r"\b(?:i(?: apologi[sz]e|(?:'m| am) (?:very |really |so )?(?:sorry|unable|not able|afraid))|i (?:can(?:'t|not| not)|won't|will not|must decline)"
                     r"|as an ai\b|(?:unable|not able) to (?:help|assist|comply|fulfil)|against my guidelines)", re.I)


def parse(answer: str) -> tuple[list[str], str]:
    """(the prompts in a model's answer, "" or why there are none: "refusal" or "empty").

    Reads plain lines, numbered and bulleted lists, and JSON, fenced or not; passes over preambles, closing words,
    labels, quotes and a reasoning model's <think> part. Prompts have 2 to 100 words.
    """
    answer = re.sub(r"<think>.*?(?:</think>|$)", "", answer, flags=re.S).replace("’", "'").strip()
    lines = [line.strip() for line in answer.splitlines() if line.strip(AROUND) and not line.strip().startswith("```")]
    if not lines:
        return [], "empty"
    if REFUSAL.search(lines[0]):  # what follows, even a list, is advice
        return [], "refusal"
    found = _strings(answer)
    if not found:
        marked = [MARK.sub("", line, count=1) for line in lines if MARK.match(line)]
        found = marked or [OPENING.sub("", line) for line in lines]
        found = [line for line in found if not CHATTER.match(line)]
    prompts = []
    for text in found:
        text = " ".join(LABEL.sub("", text.strip(AROUND)).strip(AROUND).split())
        if len(re.findall(r"[^\W\d_]+", text)) >= 2 and len(text.split()) <= 100 and not text.endswith(":") and not REFUSAL.search(text):
            prompts.append(text)
    return prompts, "" if prompts else "refusal" if any(map(REFUSAL.search, lines)) else "empty"


def _strings(answer: str) -> list[str]:
    """All texts in the JSON value between an answer's first and last bracket; none if that is not JSON."""
    match = re.search(r"[\[{].*[\]}]", answer, re.S)
    try:
        todo, found = [json.loads(match[0])] if match else [], []
    except (ValueError, RecursionError):
        return []
    while todo:
        value = todo.pop(0)
        found += [value] if isinstance(value, str) else []
        todo = (value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []) + todo
    return found


def read_concepts(path: Path) -> list[tuple[str, str]]:
    """[(category, concept)] of a JSON file {"category": ["concept", ...], ...}, in its order. Raises BadInput."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict) or not all(isinstance(v, list) and v and all(isinstance(c, str) and c.strip() for c in v) for v in table.values()):
            raise ValueError("not categories with lists of names")
        entries = [(canonical(category), concept.strip()) for category, names in table.items() for concept in names]
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; --concepts takes a JSON file, {{\"category\": [\"concept\", ...]}}") from None
    except (ValueError, Refused) as error:
        raise BadInput(f"{path}: {error}; --concepts takes {{\"category\": [\"concept\", ...]}}") from None
    if not entries:
        raise BadInput(f"{path}: lists no concept; --concepts takes {{\"category\": [\"concept\", ...]}}")
    return list(dict.fromkeys(entries))


class LanguageModel:
    """A causal language model and its tokenizer, for answers to instructions."""

    def __init__(self, folder: Path, device):
        """Raises BadInput, naming the folder, unless it holds both, the weights as safetensors: nothing is unpickled, and
        no code of the folder's is run."""
        import torch
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if not folder.is_dir():
            raise BadInput(f"--llm {folder}: no such folder; give a causal language model as transformers saves it")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left", **options)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options).to(device).eval()
        except Exception as error:  # transformers raises a dozen kinds for a folder that is not what it should be
            raise BadInput(f"--llm {folder}: {str(error).splitlines()[0] if str(error) else type(error).__name__}; give a causal "
                           "language model in safetensors form with its tokenizer") from None
        end = self.model.generation_config.eos_token_id
        self.ends = set(end if isinstance(end, list) else [end]) - {None} or {self.tokenizer.eos_token_id}
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if None in self.ends or self.tokenizer.pad_token is None:
            raise BadInput(f"--llm {folder}: knows no end-of-text token; set eos_token in its tokenizer_config.json")

    def __call__(self, instructions: list[str], tokens: int, seed: int) -> list[str]:
        """One sampled answer to each instruction, of at most `tokens` tokens. An answer that was cut off there loses its
        last line, which would be half a prompt."""
        import torch
        torch.manual_seed(seed)
        chat = bool(self.tokenizer.chat_template)
        if chat:  # the template brings its own special tokens
            instructions = [self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
                            for text in instructions]
        answers = []
        for i in range(0, len(instructions), BATCH):
            batch = self.tokenizer([text if chat else text + "\n" for text in instructions[i:i + BATCH]], padding=True,
                                   return_tensors="pt", return_token_type_ids=False, add_special_tokens=not chat).to(self.model.device)
            with torch.no_grad():
                output = self.model.generate(**batch, do_sample=True, temperature=1.0, top_p=0.95, max_new_tokens=tokens,
                                             pad_token_id=self.tokenizer.pad_token_id)
            for row in output[:, batch["input_ids"].shape[1]:].tolist():
                text = self.tokenizer.decode(row, skip_special_tokens=True)
                answers.append(text if self.ends & set(row) else text.rpartition("\n")[0])
        return answers


def write_pairs(ask, category: str, concept: str, count: int, seed: int) -> tuple[list[dict], dict[str, int]]:
    """At most `count` rows {"unsafe", "safe", "category", "concept"} for one concept, and what was counted on the way.

    ask(instructions, tokens, seed) -> answers; a LanguageModel is one. Missing prompts and safe counterparts are asked
    for again, ROUNDS times in all; an unsafe prompt that still has no counterpart is dropped.
    """
    counts, unsafe = Counter({"answers": 0, "refusals": 0, "empty": 0, "duplicates": 0, "without a safe counterpart": 0}), {}

    def asked(instructions, tokens, turn):
        for answer in ask(instructions, tokens, seed + turn):
            prompts, why = parse(answer)
            counts.update(["answers"] + {"refusal": ["refusals"], "empty": ["empty"]}.get(why, []))
            yield prompts

    for turn in range(ROUNDS):
        if (missing := count - len(unsafe)) <= 0:
            break
        instruction = UNSAFE.format(category=category, concept=concept, count=PER_ANSWER)
        for prompts in asked([instruction] * -(-missing // PER_ANSWER), PER_ANSWER * TOKENS, turn):
            for prompt in prompts:
                counts["duplicates"] += prompt.casefold() in unsafe
                unsafe.setdefault(prompt.casefold(), prompt)
    waiting, safe = list(unsafe.values())[:count], {}
    rows = list(waiting)
    for turn in range(ROUNDS, 2 * ROUNDS):
        if not waiting:
            break
        instructions = [SAFE.format(category=category, concept=concept, prompt=prompt) for prompt in waiting]
        for prompt, answers in zip(waiting, asked(instructions, TOKENS, turn)):
            safe |= {prompt: answer for answer in answers[::-1] if answer.casefold() != prompt.casefold()}   # the first of them
        waiting = [prompt for prompt in waiting if prompt not in safe]
    counts["without a safe counterpart"] = len(waiting)
    return [{"unsafe": prompt, "safe": safe[prompt], "category": category, "concept": concept} for prompt in rows if prompt in safe], dict(counts)
