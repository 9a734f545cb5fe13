"""Text encoding: prompts -> the vectors that the UNet attends to.

Needs   transformers (CLIP itself is not rebuilt here) and a Checkpoint's text encoders and tokenizers.
Gives   TextEncoders: prompts -> token ids -> context [B,L,D], and for SDXL also pooled [B,P].

What the UNet was trained on, and so what must come out, differs by family:
    SD 1.x, 2.x   context = LayerNorm(h_N)                 the last layer's output, normalised; no pooled
    SDXL          context = [h¹_{N−1} ; h²_{N−1}]          both encoders' LAST BUT ONE layer, not normalised,
                  pooled  = W_proj · LayerNorm(h²_N)[EOS]  side by side on the feature axis
Every one of these has the right shape when another is taken in its place: only the pictures get worse.

Letters: B prompts, E encoders (1, SDXL 2), L tokens a prompt (77), D context width (768, 1024, 2048),
P pooled width (1280). transformers is imported inside functions, so that --help does not wait for it.
"""

import json
import os

import torch
from torch import nn

from .checkpoint import TEXT, Checkpoint
from .files import BadInput


def _transformers():
    """transformers, silenced: its advice is about settings that the checkpoint's own files decide here."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    return transformers


def load_tokenizer(folder: str, **special):
    """The CLIP tokenizer in folder (vocab.json + merges.txt, or tokenizer.json); special: such as pad_token, over what
    its files say. Raises FileNotFoundError, and ValueError for a damaged one."""
    if not any(os.path.isfile(os.path.join(folder, name)) for name in ("vocab.json", "tokenizer.json")):
        raise FileNotFoundError(f"{folder} has no vocab.json; give a checkpoint folder that holds its tokenizer")
    # Local only: with no file missing there is nothing to ask a server for, and no command may hang offline.
    try:
        tokenizer = _transformers().CLIPTokenizer.from_pretrained(folder, local_files_only=True, **special)
        tokenizer.model_max_length = int(tokenizer.model_max_length)
        return tokenizer
    except Exception as error:   # the tokenizers library raises just that for a damaged file
        raise ValueError(f"{folder}: not a readable tokenizer ({error}); copy or download it again") from None


def build_encoder(config: dict):
    """A new transformers CLIPTextModel or CLIPTextModelWithProjection, as config["architectures"] says.

    config: the contents of text_encoder/config.json. Raises ValueError when the class is neither of the two.
    """
    transformers = _transformers()
    name = (config.get("architectures") or ["CLIPTextModel"])[0]
    if name not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise ValueError(f"a text encoder is a {name}, which is not supported; use a CLIP text encoder (SD 1.x, 2.x or SDXL)")
    return getattr(transformers, name)(transformers.CLIPTextConfig.from_dict(config))


def load_encoder(checkpoint: Checkpoint, part: str, device, dtype):
    """A checkpoint's text_encoder or text_encoder_2, frozen. Raises BadInput unless every tensor fits."""
    model = checkpoint.build(part, build_encoder, device, dtype)
    # Buffers outside the file are still on the meta device, where an index silently has no values.
    for module in model.modules():
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(model.config.max_position_embeddings, device=device)[None]       # [1,L]
    empty = [key for key, buffer in model.named_buffers() if buffer.is_meta]
    if empty:
        raise ValueError(f"{part}: this transformers {_transformers().__version__} keeps values we do not "
                         f"fill in ({empty[0]}); use the version pinned in requirements.txt")
    return model.requires_grad_(False).eval()


class TextEncoders(nn.Module):
    """One CLIP text encoder (SD 1.x, 2.x) or two (SDXL), each with its tokenizer.

    tokenizers: E transformers tokenizers. encoders: E transformers CLIP text models, in the same order.
    encoders[0] is an ordinary module: train the toy's by requires_grad_() and encode_ids.
    """

    def __init__(self, tokenizers: list, encoders: list):
        super().__init__()
        self.tokenizers, self.encoders = list(tokenizers), nn.ModuleList(encoders)
        # A tokenizer_config.json without a length means "endless"; the position table is the true limit.
        self.length = min(*(t.model_max_length for t in tokenizers),
                          *(e.config.max_position_embeddings for e in encoders))                       # L

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype=torch.float32, device="cpu"):
        """A checkpoint's, frozen; two encoders exactly if it has a text_encoder_2.
        Raises BadInput, FileNotFoundError or ValueError, one sentence that names the file."""
        return cls([load_tokenizer(folder, **special) for folder, special in checkpoint.tokenizers],
                   [load_encoder(checkpoint, part, device, dtype) for part in checkpoint.parts if part.startswith("text")])

    def save(self, folder: str):
        """Write text_encoder/ (config.json, model.safetensors) for each encoder under folder, by the
        published tensor names, which every version of every tool reads. Tokenizers are not written."""
        from safetensors.torch import save_file
        for part, encoder in zip(("", "_2"), self.encoders):
            target = os.path.join(folder, "text_encoder" + part)
            os.makedirs(target, exist_ok=True)
            state = {key if key.startswith((TEXT, "text_projection.")) else TEXT + key: tensor.contiguous()
                     for key, tensor in encoder.state_dict().items()}
            save_file(state, os.path.join(target, "model.safetensors"), metadata={"format": "pt"})
            config = {**encoder.config.to_diff_dict(), "architectures": [type(encoder).__name__]}
            with open(os.path.join(target, "config.json"), "w", encoding="utf-8") as file:
                file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def tokenize(self, prompts: list[str]) -> torch.Tensor:
        """Prompts -> ids [B,E·L] int64 (SD: simply [B,L]): each encoder's own row, side by side.

        SDXL's two tokenizers share their words but not their padding: the first pads with the end token,
        the second, like SD 2, with id 0; each says so in its files. Longer prompts lose their tail. Raises BadInput
        for one that is no text.
        """
        for prompt in prompts:
            if any("\ud800" <= c <= "\udfff" for c in prompt):  # half a character: a command line that was no UTF-8
                raise BadInput(f"the prompt {prompt!r} is no valid text; write it in UTF-8")
        rows = [t(list(prompts), padding="max_length", max_length=self.length, truncation=True,
                  return_tensors="pt").input_ids for t in self.tokenizers]                             # E × [B,L]
        return torch.cat(rows, dim=1)

    def encode_ids(self, ids: torch.Tensor):
        """ids [B,E·L] -> (context [B,L,D], pooled [B,P] or None), in the encoders' dtype; autograd is on.

        No attention mask, as in training: the encoder sees the padding, and so does the UNet.
        """
        ids = ids.to(self.encoders[0].device)
        if len(self.encoders) == 1:
            return self.encoders[0](ids).last_hidden_state, None
        outputs = [encoder(row, output_hidden_states=True)
                   for encoder, row in zip(self.encoders, ids.chunk(len(self.encoders), dim=1))]
        context = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)   # [B,L,D₁] + [B,L,D₂] -> [B,L,D]
        return context, outputs[-1].text_embeds

    @torch.no_grad()
    def encode(self, prompts: list[str]):
        """Prompts -> (context [B,L,D], pooled [B,P] or None), without autograd. "" is the unconditional prompt
        of classifier-free guidance (SDXL base replaces it by zeros when no negative prompt is given)."""
        return self.encode_ids(self.tokenize(prompts))
