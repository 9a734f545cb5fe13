"""Text encoding: prompts -> the vectors that the UNet attends to.

Needs   transformers (CLIP itself is not rebuilt here), a Checkpoint's text encoders and tokenizers.
Gives   Prompt, what the UNet reads of prompts: context [B,L,D], and for SDXL pooled [B,P];
        Tokenizers: prompts -> token ids; TextEncoders: prompts -> token ids -> Prompt.

What the UNet was trained on, and so what must come out, differs by family:
    SD 1.x, 2.x   context = LayerNorm(h_N)                 the last layer's output, normalised
    SDXL          context = [h¹_{N−1} ; h²_{N−1}]          both encoders' LAST BUT ONE layer, not
                  pooled  = W_proj · LayerNorm(h²_N)[EOS]  normalised, side by side
Each of these has the right shape in another's place: only the pictures get worse.

Letters: B prompts, E encoders (1, SDXL 2), L tokens a prompt (77), D context width (768, 1024,
2048), P pooled width (1280). transformers is imported inside functions: it costs seconds.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from model.formats.checkpoint import TEXT, Checkpoint
from model.tools.command import BadInput


@dataclass
class Prompt:
    """The states of B prompts. Batches of prompts are cut, joined and moved as one thing."""
    context: torch.Tensor                 # [B,L,D]
    pooled: torch.Tensor | None = None    # [B,P] for SDXL; else [B,0]

    def __post_init__(self):
        if self.pooled is None:
            self.pooled = self.context.new_zeros(len(self.context), 0)

    def map(self, change, *others: "Prompt") -> "Prompt":
        """change(these, the others') of both tensors."""
        prompts = (self, *others)
        return Prompt(change(*(prompt.context for prompt in prompts)),
                      change(*(prompt.pooled for prompt in prompts)))

    def __getitem__(self, which) -> "Prompt":
        """Some of the prompts: a slice, or their numbers."""
        return self.map(lambda states: states[which])

    def to(self, where) -> "Prompt":
        """On another device, or in another dtype."""
        return self.map(lambda states: states.to(where))

    def followed_by(self, *others: "Prompt") -> "Prompt":
        """These prompts and the others' as one batch."""
        return self.map(lambda *parts: torch.cat(parts), *others)

    def replaced(self, where, other: "Prompt") -> "Prompt":
        """These prompts, but the other one [1,..] in the places `where` [B] is true."""
        return Prompt(torch.where(where[:, None, None], other.context, self.context),
                      torch.where(where[:, None], other.pooled, self.pooled))


def silent_transformers():
    import transformers
    transformers.utils.logging.set_verbosity_error()    # the checkpoint's own files decide here
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_tokenizer(folder: Path, **special):
    """The CLIP tokenizer in folder (vocab.json + merges.txt, or tokenizer.json). special: tokens
    such as pad_token, over what its files say. Raises BadInput if it is missing or damaged."""
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise BadInput(f"{folder} has no vocab.json; copy the tokenizer of a diffusers checkpoint "
                       "there (a single file carries none)")
    kind = silent_transformers().CLIPTokenizer
    try:    # local files only: no command may hang where there is no network
        tokenizer = kind.from_pretrained(folder, local_files_only=True, **special)
        tokenizer.model_max_length = int(tokenizer.model_max_length)
        return tokenizer
    except Exception as error:    # the tokenizers library raises just that for a damaged file
        raise BadInput(f"{folder}: not a readable tokenizer ({error}); copy it again") from None


def build_encoder(config: dict):
    """A new CLIPTextModel or CLIPTextModelWithProjection of transformers, as
    config["architectures"] says. Raises ValueError if it is neither, or has no such depth."""
    name = (config.get("architectures") or ["CLIPTextModel"])[0]
    if name not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise ValueError(f"a text encoder is a {name}, which is not supported, only CLIP's")
    depth = config.get("num_hidden_layers", 12)
    if not isinstance(depth, int) or not 0 < depth <= 100:    # a damaged one would build for hours
        raise ValueError(f"a text encoder of num_hidden_layers {depth!r} is not one of CLIP's")
    transformers = silent_transformers()
    return getattr(transformers, name)(transformers.CLIPTextConfig.from_dict(config))


def load_encoder(checkpoint: Checkpoint, part: str, device, dtype):
    """A checkpoint's text_encoder or text_encoder_2, frozen."""
    model = checkpoint.load(part, build_encoder, device, dtype)
    for module in model.modules():
        if "position_ids" in module._buffers:    # in no file, and so still on the meta device
            length = model.config.max_position_embeddings
            module.position_ids = torch.arange(length, device=device)[None]    # [1,L]
    return model.requires_grad_(False).eval()


def check_text(prompts: list[str]):
    for prompt in prompts:
        if any("\ud800" <= c <= "\udfff" for c in prompt):    # from bytes that are not UTF-8
            raise BadInput(f"the prompt {prompt!r} is not valid text; write it in UTF-8")


def places_in(config: dict) -> int:
    """How many tokens an encoder of this config reads."""
    return int(config.get("max_position_embeddings", 77))


class Tokenizers:
    """A checkpoint's one CLIP tokenizer (SD 1.x, 2.x) or two (SDXL)."""
    def __init__(self, tokenizers: list, places: list[int]):
        """places: how many tokens each encoder has a position for."""
        # L. Without a length in its file a tokenizer is endless; the position table is the limit.
        self.length = min(*(tokenizer.model_max_length for tokenizer in tokenizers), *places)
        self.tokenizers = tokenizers

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Tokenizers":
        """A checkpoint's, without its encoders. Raises BadInput, naming the file."""
        places = [checkpoint.from_config(part, places_in) for part in checkpoint.parts
                  if part.startswith("text_encoder")]
        return cls([load_tokenizer(folder, **special) for folder, special in checkpoint.tokenizers],
                   places)

    def tokenize(self, prompts: list[str]):
        """Prompts -> ids [B,E·L] int64: each encoder's own row, side by side. Longer prompts lose
        their tail. Raises BadInput for a prompt that is not valid text.

        SDXL's two tokenizers share their words but not their padding: the first pads with the end
        token, the second, like SD 2, with id 0; each says so in its files.
        """
        check_text(prompts)
        rows = [tokenizer(list(prompts), padding="max_length", max_length=self.length,
                          truncation=True, return_tensors="pt").input_ids
                for tokenizer in self.tokenizers]    # E × [B,L]
        return torch.cat(rows, dim=1)

    def cut(self, prompts: list[str]) -> str:
        """A sentence that counts the prompts that lose their tail; "" if there are none."""
        check_text(prompts)
        texts = self.tokenizers[0](list(prompts)).input_ids if prompts else []    # with both ends
        longer = sum(len(ids) > self.length for ids in texts)
        return (f"{longer:,} of {len(prompts):,} prompts are longer than the {self.length} tokens "
                "that the model reads; their ends are cut off") if longer else ""


class TextEncoders(Tokenizers, nn.Module):
    """One CLIP text encoder (SD 1.x, 2.x) or two (SDXL), each with its tokenizer."""
    def __init__(self, tokenizers: list, encoders: list):
        nn.Module.__init__(self)
        places = [encoder.config.max_position_embeddings for encoder in encoders]
        Tokenizers.__init__(self, tokenizers, places)
        self.encoders = nn.ModuleList(encoders)

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype, device):
        """A checkpoint's. Raises BadInput, naming the file."""
        encoders = [load_encoder(checkpoint, part, device, dtype)
                    for part in checkpoint.parts if part.startswith("text_encoder")]
        return cls(Tokenizers.of(checkpoint).tokenizers, encoders)

    def save(self, folder: Path):
        """Writes the first encoder, without its tokenizer, to text_encoder/, by the published
        tensor names, which every version of every tool reads."""
        encoder, path = self.encoders[0], folder / "text_encoder"
        path.mkdir(parents=True, exist_ok=True)
        state = {TEXT + key: tensor.contiguous()
                 for key, tensor in encoder.state_dict().items()}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        config = {**encoder.config.to_diff_dict(), "architectures": [type(encoder).__name__]}
        (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def encode_ids(self, ids) -> Prompt:
        """ids [B,E·L] -> their states, in the encoders' dtype; autograd is on. No attention mask,
        as in training: encoder and UNet see the padding."""
        ids = ids.to(self.encoders[0].device)
        if len(self.encoders) == 1:
            return Prompt(self.encoders[0](ids).last_hidden_state)
        outputs = [encoder(row, output_hidden_states=True)
                   for encoder, row in zip(self.encoders, ids.chunk(2, dim=1))]
        context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)    # [B,L,D]
        return Prompt(context, outputs[-1].text_embeds)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Prompt:
        """encode_ids() of prompts, without autograd."""
        return self.encode_ids(self.tokenize(prompts))
