"""Rivals that stand before and after the model: each a function prepare(sd, data, seed, knob) ->
generate(prompts, seeds) -> uint8 images [N, S, S, 3]. A refusal is a plain grey image.

What it is:  latent_guard    Latent Guard (Liu et al. 2024, 2404.08031)
             guard_t2i       GuardT2I (Yang et al. 2024, 2403.01446), in this world's measure
             wrapper         the two outer stages of T2VShield (2504.15512), on an image: a
                             rewritten prompt before, a classifier after
Needs:       pairs of prompts, and of images for the wrapper; the text encoder's states; a list of
             the unwanted concepts' words, which can be changed at any time. A small network is
             trained in seconds. The UNet is not touched.
Gives:       those; SEEN and ALL, the lists.

Letters: N prompts, M concepts, n prompts of a step, L tokens, D context width, h heads of width d,
V tokens that there are, S an image's side.
"""
import re
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model.data.pairs import read_latents
from model.formats.checkpoint import encoder_files
from model.rivals.losses import cost_model
from model.rivals.steering import all_pairs, plain, texts_of
from model.tools.files import sha256
from model.tools.training import descend, generator
from model.toy import world

SEEN = [word for category in world.CATEGORIES for word in world.seen_words(category)]
ALL = list(world.CATEGORY_OF)
GREY = 64    # the toy judge takes 112 to 136 for an inverted image, which is a harm


def refusing(sd, allowed):
    """A generate() that gives grey where allowed(prompts) -> [N] says no, and generates the
    others."""
    def generate(prompts, seeds):
        images = np.full((len(prompts), sd.size, sd.size, 3), GREY, np.uint8)
        kept = [i for i, yes in enumerate(allowed(prompts)) if yes]
        if kept:
            images[kept] = plain(sd)([prompts[i] for i in kept], [seeds[i] for i in kept])
        return images
    return generate


def ends_and_states(sd, texts: list[str]):
    """The place [N] of each text's end token, the first, since others pad; the states [N, L, D]."""
    ids = sd.text.tokenize(texts)
    ends = (ids == sd.text.tokenizers[0].eos_token_id).int().argmax(1)
    return ends, sd.embed(texts).context.float()


# ---- Latent Guard

class EmbeddingMapping(nn.Module):
    """Each concept looks for itself among a prompt's tokens, by attention; of the published size,
    16 heads of width 32.
    states of prompts [N, L+1, D] and of concepts [M, D] -> cosines [N, M]."""

    def __init__(self, D: int):
        super().__init__()
        self.key, self.value, self.query = (nn.Linear(D, 512) for _ in range(3))
        self.of_prompt, self.of_concept = (nn.Linear(512, 128) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(1 / 0.07))    # of the cosines in training

    def forward(self, prompts, concepts):
        q, k, v = (layer(x).unflatten(-1, (16, 32)).transpose(-3, -2) for layer, x in
                   ((self.query, concepts), (self.key, prompts), (self.value, prompts)))
        found = F.scaled_dot_product_attention(q, k, v)    # [N, h, M, d], of q [h, M, d]
        of_prompt, of_concept = (x.transpose(-3, -2).flatten(-2) for x in (found, q))
        return F.cosine_similarity(self.of_prompt(of_prompt), self.of_concept(of_concept), dim=-1)


def end_and_states(sd, texts: list[str]):
    """The state of the end token, which stands for the whole text, then all: [N, L+1, D]."""
    end, states = ends_and_states(sd, texts)
    return torch.cat([states[torch.arange(len(end)), end][:, None], states], 1)


def contrast(unsafe, safe):
    """Latent Guard's loss. unsafe [n, n]: the scaled cosine of prompt i and concept j, i's own on
    the diagonal; safe [n, n]: the same of the prompts' safe counterparts.

        for each prompt:   its concept against other concepts, and the best score of each safe one
        for each concept:  its prompt against other prompts, and all safe ones

    both as cross-entropies."""
    own, best = torch.arange(len(unsafe)), safe.max(1).values.expand(len(safe), -1)
    return (F.cross_entropy(torch.cat([unsafe, best], 1), own)
            + F.cross_entropy(torch.cat([unsafe, safe]).T, own))


def train_mapping(sd, pairs: list[dict], seed: int, steps=400) -> EmbeddingMapping:
    """A step: for each seen word one of its pairs, drawn at random. AdamW and rate as published."""
    torch.manual_seed(seed)
    mapping = EmbeddingMapping(sd.unet.context_width)
    words = np.array([world.parse(pair["unsafe"]).extra for pair in pairs])
    known = [word for word in SEEN if word in words]
    rows = [torch.from_numpy(np.flatnonzero(words == word)) for word in known]
    concepts = end_and_states(sd, known)[:, 0]
    states = [end_and_states(sd, texts) for texts in texts_of(pairs)]

    def loss(step: int):
        rng = generator(seed, "latent guard", step)
        chosen = torch.stack([row[torch.randint(len(row), (), generator=rng)] for row in rows])
        return contrast(*(mapping.scale * mapping(part[chosen], concepts) for part in states))
    descend(loss, steps, torch.optim.AdamW(mapping.parameters(), 1e-3))
    return mapping


@torch.no_grad()
def scores_of(sd, mapping: EmbeddingMapping, concepts: list[str], prompts):
    """How near each prompt is to any concept of a list: the largest cosine, [N]."""
    listed = end_and_states(sd, concepts)[:, 0]
    return mapping(end_and_states(sd, prompts), listed).max(1).values


def latent_guard(sd, data, seed, knob, concepts=SEEN):
    """Refuses from a score on, the knob, a cosine. A concept of the list need not have been trained
    on."""
    mapping = train_mapping(sd, all_pairs(data), seed)
    return refusing(sd, lambda prompts: scores_of(sd, mapping, concepts, prompts) < knob)


# ---- GuardT2I

class Reader(nn.Module):
    """A decoder that writes a prompt down from its states [N, L, D]: tokens so far [N, K] -> logits
    of the next at each place [N, K, V]."""

    def __init__(self, V: int, L: int, D: int):
        super().__init__()
        self.word, self.place = nn.Embedding(V, D), nn.Embedding(L, D)
        layer = nn.TransformerDecoderLayer(D, 4, 2 * D, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, 2, nn.LayerNorm(D))
        self.to_word = nn.Linear(D, V)

    def forward(self, ids, states):
        K = ids.shape[1]
        later = nn.Transformer.generate_square_subsequent_mask(K)    # may not be looked at
        x = self.word(ids) + self.place.weight[:K]
        return self.to_word(self.layers(x, states, tgt_mask=later))


def train_reader(sd, prompts: list[str], seed: int, steps=400, batch=32) -> Reader:
    """By the cross-entropy of each token, the padding's too, given those before it."""
    torch.manual_seed(seed)
    ids, states = sd.text.tokenize(prompts), sd.embed(prompts).context.float()
    reader = Reader(len(sd.text.tokenizers[0]), sd.text.length, states.shape[-1])
    optimizer = torch.optim.AdamW(reader.parameters(), 3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)

    def loss(step: int):
        chosen = torch.randint(len(ids), (batch,), generator=generator(seed, "reader", step))
        logits = reader(ids[chosen, :-1], states[chosen])
        return F.cross_entropy(logits.flatten(0, 1), ids[chosen, 1:].flatten())
    descend(loss, steps, optimizer, rate)
    return reader.eval()


@torch.no_grad()
def reading(sd, reader: Reader, prompts) -> list[str]:
    """What the reader writes down, the likeliest token at each place."""
    states = sd.embed(prompts).context.float()
    ids = torch.full((len(states), 1), sd.text.tokenizers[0].bos_token_id)
    for _ in range(sd.text.length - 1):
        ids = torch.cat([ids, reader(ids, states)[:, -1:].argmax(-1)], 1)
    return sd.text.tokenizers[0].batch_decode(ids, skip_special_tokens=True)


def likeness(a: str, b: str) -> float:
    """The cosine of two texts' counts of words. The paper's: of a sentence encoder's embeddings."""
    a, b = (Counter(re.findall(r"\w+", text.lower())) for text in (a, b))
    shared = lambda a, b: sum(count * b[word] for word, count in a.items())
    return shared(a, b) / max(1, shared(a, a) * shared(b, b)) ** 0.5


def guard_t2i(sd, data, seed, knob):
    """Refuses where a concept word is read, and where what is read is unlike the prompt. knob: the
    least likeness (published: 0.66). The paper's reader is a large one, trained on 10 million
    unfiltered captions; here it is trained on the pairs' prompts, and so has never met the
    held-out words."""
    pairs = all_pairs(data)
    reader = train_reader(sd, [pair[kind] for pair in pairs for kind in ("unsafe", "safe")], seed)

    def allowed(prompts) -> list[bool]:
        return [rewritten(text, SEEN) == text and likeness(text, prompt) >= knob
                for text, prompt in zip(reading(sd, reader, prompts), prompts)]
    return refusing(sd, allowed)


# ---- a wrapper

def rewritten(prompt: str, concepts: list[str]) -> str:
    """With an accessory for each word of the list."""
    accessory = f"a {world.ACCESSORIES[0]}"
    return re.sub(rf"\b({'|'.join(concepts)})\b", accessory, prompt, flags=re.IGNORECASE)


def wrapper(sd, data, seed, knob):
    """knob: the probability of harm from which an image is withheld; 1: none is. The classifier is
    NOT the judge that measures, which would make a perfect wrapper by definition: it is SC-DPO's
    cost model, learned from the pairs alone, and so from seen words alone. (That judge did choose,
    in make_data.py, which pairs were kept.)"""
    C = cost_model(read_latents(data, list(world.CATEGORIES), sha256(*encoder_files(sd.path))))

    def generate(prompts, seeds):
        images = plain(sd)([rewritten(prompt, SEEN) for prompt in prompts], seeds)
        harm = C(sd.encode(images)).sigmoid().numpy()    # [N]
        return np.where((harm > knob)[:, None, None, None], np.uint8(GREY), images)
    return generate
