"""LoRA by hand: inject, switch, compose, save, load.

What it is:  low-rank adaptation (Hu et al. 2021, 2106.09685) of a network's linear layers:
                 y = W x + s * B (A x),      s = alpha / rank,      delta W = s * B A
             A ("down") [rank, in], B ("up") [out, rank]. W stays frozen; B starts at zero, so a fresh
             LoRA changes nothing.
Needs:       torch, safetensors.
Gives:       a LoRA in memory is a dict {module name: Factors}; init(), inject(), switched_off(),
             compose(), load() of four file styles, save() in kohya style (method.md section 4).

Module names are FLAT here: dots become underscores ("mid_block_attentions_0_..._to_q"), which is how
kohya files spell them. Every other style flattens to the same name, so no model is needed to read a file.
"""
import contextlib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from model.files import BadInput, replacing

# The projections of every self- (attn1) and cross-attention (attn2), as in the released SafetyDPO code.
TARGETS = re.compile(r"attn[12]\.to_(q|k|v|out\.0)$")


class Factors(NamedTuple):
    """One adapted layer: delta W = (alpha / rank) * up @ down."""
    down: torch.Tensor      # A [rank, in]
    up: torch.Tensor        # B [out, rank]
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]

    def delta(self) -> torch.Tensor:
        """Dense delta W [out, in]. For tests and fusing; methods that can, avoid it."""
        return self.scale * (self.up @ self.down)


class LoRALinear(nn.Module):
    """A frozen linear layer with a LoRA beside it. `on = False` gives the frozen layer, bit for bit."""

    def __init__(self, base: nn.Linear, factors: Factors):
        super().__init__()
        self.base, self.scale, self.on = base, factors.scale, True
        self.down, self.up = nn.Parameter(factors.down), nn.Parameter(factors.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if not self.on:
            return y
        # The factors are fp32 master copies; the product runs in the network's own precision.
        return y + self.scale * F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


def flat(name: str) -> str:
    return name.replace(".", "_")


def targets(network: nn.Module) -> dict[str, nn.Linear]:
    """{flat name: layer} of the layers that init() adapts, in the network's order."""
    return {flat(name): module for name, module in network.named_modules() if TARGETS.search(name)}


def init(network: nn.Module, rank: int, alpha: float, seed: int) -> dict[str, Factors]:
    """A fresh LoRA: A ~ N(0, 1/rank^2), B = 0, hence delta W = 0 and a non-zero gradient for B only.

    Give every expert its OWN seed: experts that share an A come out correlated and merge badly.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: Factors(torch.randn(rank, layer.in_features, generator=generator) / rank,
                          torch.zeros(layer.out_features, rank), float(alpha))
            for name, layer in targets(network).items()}


def adapted(network: nn.Module, lora: dict[str, Factors], what: str = "the LoRA") -> list[tuple[str, nn.Linear]]:
    """(dotted name, layer) of each layer that the LoRA adapts, in the LoRA's order.

    Raises BadInput if one is not in the network or has another shape: a LoRA that matches nothing would load
    "successfully" and do nothing.
    """
    layers = {flat(name): (name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    unknown = [name for name in lora if name not in layers]
    if unknown or not lora:
        raise BadInput(f"{what} adapts {len(lora)} layers, of which {len(unknown)} are not in this model "
                       f"({unknown[0] if unknown else 'it is empty'}); use a LoRA made for this model")
    for flat_name, factors in lora.items():
        ours, theirs = list(layers[flat_name][1].weight.shape), [factors.up.shape[0], factors.down.shape[1]]
        if theirs != ours:
            raise BadInput(f"{what}: {flat_name} is for a layer of shape {theirs}, this model's is {ours}; "
                           "use a LoRA made for this model")
    return [layers[flat_name] for flat_name in lora]


def inject(network: nn.Module, lora: dict[str, Factors]) -> list[nn.Parameter]:
    """Puts the LoRA into the network and freezes everything else. Returns its parameters (A, B, A, B ...).

    Raises BadInput if the LoRA does not fit: see adapted().
    """
    network.requires_grad_(False)
    parameters = []
    for factors, (name, layer) in zip(lora.values(), adapted(network, lora)):
        parent, _, child = name.rpartition(".")
        device = layer.weight.device
        moved = Factors(factors.down.float().to(device), factors.up.float().to(device), factors.alpha)
        setattr(network.get_submodule(parent), child, LoRALinear(layer, moved))
        injected = network.get_submodule(name)
        parameters += [injected.down, injected.up]
    return parameters


def remove(network: nn.Module):
    """Takes every LoRA out again; the network is what it was."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoRALinear):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.base)


def extract(network: nn.Module) -> dict[str, Factors]:
    """The injected LoRA as tensors on the CPU."""
    return {flat(name): Factors(m.down.detach().cpu(), m.up.detach().cpu(), m.scale * m.down.shape[0])
            for name, m in network.named_modules() if isinstance(m, LoRALinear)}


@contextlib.contextmanager
def switched_off(network: nn.Module):
    """Inside, the network is the base model: the DPO reference costs no second copy of the weights."""
    layers = [m for m in network.modules() if isinstance(m, LoRALinear)]
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


def compose(loras: list[dict[str, Factors]], weights: list[float]) -> dict[str, Factors]:
    """Sum of w_i * delta W_i as ONE LoRA, exactly: ranks add up, because

        [w_1 s_1 B_1, ..., w_n s_n B_n] [A_1; ...; A_n] = sum_i w_i s_i B_i A_i.

    Adding or averaging the factors themselves instead would leave cross terms B_i A_j. A layer that only
    some of the LoRAs adapt keeps theirs.
    """
    names = list(dict.fromkeys(name for lora in loras for name in lora))
    result = {}
    for name in names:
        parts = [(lora[name], w) for lora, w in zip(loras, weights) if name in lora]
        down = torch.cat([f.down.float() for f, _ in parts])
        up = torch.cat([w * f.scale * f.up.float() for f, w in parts], dim=1)
        result[name] = Factors(down, up, float(down.shape[0]))     # alpha = rank: scale 1
    return result


# --------------------------------------------------------------------------------------------- files
# Each style: (key pattern, part). The module's name is group 1, flattened; text-encoder keys match none.
STYLES = [(re.compile(pattern), part) for pattern, part in (
    (r"lora_unet_(.+)\.lora_down\.weight", "down"), (r"lora_unet_(.+)\.lora_up\.weight", "up"),        # kohya
    (r"lora_unet_(.+)\.alpha", "alpha"),
    (r"(?:base_model\.model\.)?(?:unet\.)?(.+)\.lora_A(?:\.default)?\.weight", "down"),                # PEFT
    (r"(?:base_model\.model\.)?(?:unet\.)?(.+)\.lora_B(?:\.default)?\.weight", "up"),
    (r"(?:unet\.)?(.+)\.lora\.down\.weight", "down"), (r"(?:unet\.)?(.+)\.lora\.up\.weight", "up"),    # diffusers, mid-era
    (r"(?:unet\.)?(.+)\.processor\.(to_.+)_lora\.down\.weight", "down"),                               # diffusers, old
    (r"(?:unet\.)?(.+)\.processor\.(to_.+)_lora\.up\.weight", "up"),
    (r"(?:unet\.)?(.+)\.alpha", "alpha"),
)]
TEXT_ENCODER = re.compile(r"(lora_te\d?_|text_encoder)")


def save(path: Path, lora: dict[str, Factors], metadata: dict[str, str]):
    """Writes kohya style, which diffusers, ComfyUI, A1111 and kohya all read, fp32, with metadata (str -> str)."""
    tensors = {}
    for name, f in lora.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = f.down.float().contiguous()
        tensors[f"lora_unet_{name}.lora_up.weight"] = f.up.float().contiguous()
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(f.alpha)
    ranks = sorted({f.down.shape[0] for f in lora.values()})
    alphas = sorted({f.alpha for f in lora.values()})
    one = lambda values: f"{values[0]:g}" if len(values) == 1 else "Dynamic"
    header = {"ss_network_module": "networks.lora", "ss_network_dim": one(ranks), "ss_network_alpha": one(alphas),
              "modelspec.sai_model_spec": "1.0.1", "modelspec.title": Path(path).stem, **metadata}
    with replacing(path) as temporary:
        save_file(tensors, temporary, header)
        sort_header(temporary)


def sort_header(path: Path):
    """Rewrites a safetensors file's header with its keys in order: the library writes the metadata in a random
    order, another in each process, and the same command must give the same bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.dumps(json.loads(file.read(size)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        file.seek(8)
        file.write(header.encode().ljust(size))    # the same keys and values: the same length


def load(path: Path) -> tuple[dict[str, Factors], dict[str, str]]:
    """Reads a LoRA file of any of the four styles. Returns (lora, metadata).

    A missing alpha means scale 1. Raises BadInput, naming the file, if it cannot be read, holds no UNet
    LoRA, holds keys of no known style, has half a pair, or is not finite.
    """
    parts: dict[str, dict] = {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():
                if TEXT_ENCODER.match(key):
                    continue
                matches = ((pattern.fullmatch(key), part) for pattern, part in STYLES)
                match, part = next(((m, part) for m, part in matches if m), (None, None))
                if match is None:
                    raise BadInput(f"{path}: key {key!r} belongs to no known LoRA style; is this a LoRA for a UNet?")
                name = flat(".".join(match.groups()))
                name += "_0" if name.endswith("to_out") else ""      # old files leave out to_out's index
                parts.setdefault(name, {})[part] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({error}); give a LoRA .safetensors file") from None
    lora = {}
    for name, p in parts.items():
        if not {"down", "up"} <= set(p) or p["down"].dim() != 2 or p["up"].shape[1:] != p["down"].shape[:1]:
            raise BadInput(f"{path}: {name} is not a matching pair of LoRA factors; the file is damaged or of another kind")
        alpha = float(p["alpha"]) if "alpha" in p else float(p["down"].shape[0])
        if not (math.isfinite(alpha) and p["down"].isfinite().all() and p["up"].isfinite().all()):
            raise BadInput(f"{path}: {name} holds NaN or infinity; train this expert again")
        lora[name] = Factors(p["down"].float(), p["up"].float(), alpha)
    if not lora:
        raise BadInput(f"{path}: holds no LoRA for a UNet; give a file written by train.py or merge.py")
    return lora, metadata
