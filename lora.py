"""LoRA by hand: inject, switch, compose, save, load.

What it is:  low-rank adaptation (Hu et al. 2021, 2106.09685) of a network's linear layers:
                 y = W x + s * B (A x),      s = alpha / rank,      delta W = s * B A
             A ("down") [rank, in], B ("up") [out, rank]. W stays frozen; B starts at zero, so a fresh
             LoRA changes nothing.
Needs:       torch, safetensors.
Gives:       a LoRA in memory is a dict {module name: Factors}; init(), inject(), switched_off(), fuse(), stack(),
             compose(), compress(), match(); load() of four file styles, LoRAFile for layer by layer, read() of several
             files, save() in kohya style.

Module names are FLAT here: dots become underscores ("mid_block_attentions_0_..._to_q"), which is how
kohya files spell them. Every other style flattens to the same name, so no model is needed to read a file.

A convolution is a linear layer over the pixels under its kernel: its A is [rank, in * kernel area], and all algebra
below holds for it unchanged. Letters: r rank, I and O a layer's input and output width, k k a kernel's sides.
"""
import contextlib
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.files import BadInput, opened, save_tensors
from model.single_file import unet_name

# The projections of every self- (attn1) and cross-attention (attn2), as in the released SafetyDPO code.
TARGETS = re.compile(r"attn[12]\.to_(q|k|v|out\.0)$")


# How wide the prompt is tells the family; so the ecosystem calls it: (name, modelspec.architecture, ss_base_model_version).
FAMILIES = {768: ("SD 1.x", "stable-diffusion-v1", "sd_v1"), 1024: ("SD 2.x", "stable-diffusion-v2-512", "sd_v2"),
            2048: ("SDXL", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0")}


class Factors(NamedTuple):
    """One adapted layer: delta W = (alpha / rank) * up @ down."""
    down: torch.Tensor              # A [r, I], of a convolution [r, I*k*k]
    up: torch.Tensor                # B [O, r]
    alpha: float
    kernel: tuple[int, ...] = ()    # (k, k) where a file keeps the factors as convolutions; written so again

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]

    def delta(self) -> torch.Tensor:
        """Dense delta W [O, I(*k*k)]. For tests and fusing; methods that can, avoid it."""
        return self.scale * (self.up @ self.down)


class LoRALayer(nn.Module):
    """A frozen linear layer or convolution with a LoRA beside it (README, eq. 5). `on = False` gives the frozen layer, bit for bit."""

    def __init__(self, base: nn.Linear | nn.Conv2d, factors: Factors):
        super().__init__()
        self.base, self.scale, self.on = base, factors.scale, True
        self.down, self.up = nn.Parameter(factors.down), nn.Parameter(factors.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if not self.on:
            return y
        # The factors are fp32 master copies; the product runs in the network's own precision.
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(self.base, nn.Linear):
            return y + F.linear(self.scale * F.linear(x, down), up)                        # the scale, where it is cheap
        down = down.view(-1, *self.base.weight.shape[1:])                                  # [r, I, k, k]
        return y + self.scale * F.conv2d(F.conv2d(x, down, None, self.base.stride, self.base.padding), up[:, :, None, None])

    def factors(self) -> Factors:
        return Factors(self.down, self.up, self.scale * len(self.down), tuple(self.base.weight.shape[2:]))


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


def layers(network: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """{flat name: (name, layer)} of all that a LoRA can adapt."""
    return {flat(name): (name, m) for name, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def prompt_width(shapes: dict[str, int]) -> int | None:
    """Input width of the first cross-attention's to_k, out of {flat name: input width}: the family's mark."""
    return next((width for name, width in shapes.items() if name.endswith("attn2_to_k")), None)


def adapted(network: nn.Module, lora: dict[str, Factors], what: str = "the LoRA") -> list[tuple[str, nn.Module]]:
    """(dotted name, layer) of each layer that the LoRA adapts, in the LoRA's order.

    Raises BadInput, naming `what`, if one has another shape (the LoRA is for another family) or is not in the network: a
    LoRA that matches nothing would load "successfully" and do nothing.
    """
    known = layers(network)
    family = lambda shapes: FAMILIES.get(prompt_width(shapes), ("another model",))[0]
    for name, f in lora.items():
        if name in known:
            out, *rest = known[name][1].weight.shape
            theirs, ours = [len(f.up), f.down.shape[1]], [out, math.prod(rest)]
            if theirs != ours:
                raise BadInput(f"{what}: {name} is for a layer of shape {theirs}, this model's is {ours}: a LoRA for "
                               f"{family({n: f.down.shape[1] for n, f in lora.items()})}, and this model is "
                               f"{family({n: m.weight.shape[1] for n, (_, m) in known.items()})}; use a LoRA made for this model")
    unknown = [name for name in lora if name not in known]
    if unknown or not lora:
        raise BadInput(f"{what} adapts {len(lora)} layers, of which {len(unknown)} are not in this model "
                       f"({unknown[0] if unknown else 'it is empty'}); use a LoRA made for this model")
    return [known[name] for name in lora]


def match(network: nn.Module, lora: dict[str, Factors], what: str) -> dict[str, Factors]:
    """The part of a LoRA that is for layers of this network (a meta one will do), with a note on stderr that counts and
    names the rest. Raises BadInput as adapted() does, if that part does not fit or is nothing."""
    known = layers(network)
    found, rest = {name: f for name, f in lora.items() if name in known}, [name for name in lora if name not in known]
    adapted(network, found or lora, what)
    if rest:
        print(f"note: {what}: {len(rest)} of {len(lora)} layers are not in this model and are left out: "
              f"{', '.join(rest[:3])}{' ...' if rest[3:] else ''}", file=sys.stderr)
    # A linear layer and a 1x1 convolution are one thing, and some files have the other one: ours from here on.
    return {name: f._replace(kernel=tuple(known[name][1].weight.shape[2:])) for name, f in found.items()}


def inject(network: nn.Module, lora: dict[str, Factors]) -> list[nn.Parameter]:
    """Puts the LoRA into the network and freezes everything else. Returns its parameters (A, B, A, B ...).
    Raises BadInput if the LoRA does not fit: see adapted()."""
    network.requires_grad_(False)
    parameters = []
    for factors, (name, layer) in zip(lora.values(), adapted(network, lora)):
        parent, _, child = name.rpartition(".")
        device = layer.weight.device
        injected = LoRALayer(layer, factors._replace(down=factors.down.float().to(device), up=factors.up.float().to(device)))
        setattr(network.get_submodule(parent), child, injected)
        parameters += [injected.down, injected.up]
    return parameters


@torch.no_grad()
def fuse(network: nn.Module, lora: dict[str, Factors]):
    """W + delta W for every layer of the LoRA, for good: what is trained or injected next starts from there. In new
    tensors, since the old ones may be a file's mapped memory, and rounded to the weights' own dtype. Raises BadInput as adapted() does."""
    for f, (_, layer) in zip(lora.values(), adapted(network, lora)):
        weight = layer.weight
        delta = f._replace(down=f.down.to(weight.device), up=f.up.to(weight.device)).delta()
        layer.weight = nn.Parameter((weight.float() + delta.reshape(weight.shape)).to(weight.dtype), requires_grad=False)


def remove(network: nn.Module):
    """Takes every LoRA out again; the network is what it was."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoRALayer):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.base)


def extract(network: nn.Module) -> dict[str, Factors]:
    """The injected LoRA as tensors on the CPU."""
    return {flat(name): (f := m.factors())._replace(down=f.down.detach().cpu(), up=f.up.detach().cpu())
            for name, m in network.named_modules() if isinstance(m, LoRALayer)}


@contextlib.contextmanager
def switched_off(network: nn.Module):
    """Inside, the network is the base model: the DPO reference costs no second copy of the weights."""
    switches = [m for m in network.modules() if isinstance(m, LoRALayer)]
    for layer in switches:
        layer.on = False
    try:
        yield
    finally:
        for layer in switches:
            layer.on = True


def stack(parts: list[Factors], weights: list[float]) -> Factors:
    """Sum of w_i * delta W_i of ONE layer as one pair of factors, exactly (README, eq. 6): ranks add up, because

        [w_1 s_1 B_1, ..., w_n s_n B_n] [A_1; ...; A_n] = sum_i w_i s_i B_i A_i.

    Adding or averaging the factors themselves instead would leave cross terms B_i A_j.
    """
    down = torch.cat([f.down.float() for f in parts])
    up = torch.cat([w * f.scale * f.up.float() for f, w in zip(parts, weights)], dim=1)
    return Factors(down, up, float(down.shape[0]), parts[0].kernel)                      # alpha = rank: scale 1


def compose(loras: list[dict[str, Factors]], weights: list[float]) -> dict[str, Factors]:
    """stack() of every layer. A layer that only some of the LoRAs adapt keeps theirs."""
    names = dict.fromkeys(name for lora in loras for name in lora)
    return {name: stack(*zip(*((lora[name], w) for lora, w in zip(loras, weights) if name in lora))) for name in names}


def compress(f: Factors, rank: int) -> tuple[Factors, float, float]:
    """The closest delta W of at most this rank (Eckart & Young 1936; README, eq. 7), its energy |delta W|^2, and that of f.

    Never by the SVD of a dense delta W where f has a lower rank: with thin QRs B = Q_B R_B and A^T = Q_A R_A, all that is
    left to decompose is the small core s R_B R_A^T. A factor that is not taller than wide stays as it is (Q = 1), so that
    the core of very many stacked experts is no larger than delta W.
    """
    thin = lambda x: torch.linalg.qr(x) if x.shape[0] > x.shape[1] else (torch.eye(len(x)), x)
    (Q_B, R_B), (Q_A, R_A) = thin(f.up.float()), thin(f.down.float().T)
    U, S, V = torch.linalg.svd(f.scale * R_B @ R_A.T, full_matrices=False)                 # core = U S V
    energy, root = S.double().square(), S[:rank].sqrt()    # half of S to each factor: both of a size that fp16 can hold
    smaller = Factors(root[:, None] * (V[:rank] @ Q_A.T), Q_B @ U[:, :rank] * root, float(len(root)), f.kernel)
    return smaller, energy[:rank].sum().item(), energy.sum().item()


# --------------------------------------------------------------------------------------------- files
# Each style: (key pattern, part). The module's name is group 1, flattened; text-encoder keys match none.
UNET = r"(?:base_model\.model\.)?(?:unet\.)?"
STYLES = [(re.compile(pattern), part) for pattern, part in (
    (r"lora_unet_(.+)\.lora_down\.weight", "down"), (r"lora_unet_(.+)\.lora_up\.weight", "up"),        # kohya
    (r"lora_unet_(.+)\.alpha", "alpha"),
    (UNET + r"(.+)\.lora_A(?:\.default)?\.weight", "down"), (UNET + r"(.+)\.lora_B(?:\.default)?\.weight", "up"),   # PEFT
    (r"(?:unet\.)?(.+)\.lora\.down\.weight", "down"), (r"(?:unet\.)?(.+)\.lora\.up\.weight", "up"),    # diffusers, mid-era
    (r"(?:unet\.)?(.+)\.processor\.(to_.+)_lora\.down\.weight", "down"),                               # diffusers, old
    (r"(?:unet\.)?(.+)\.processor\.(to_.+)_lora\.up\.weight", "up"),
    (r"(?:unet\.)?(.+)\.processor\.(to_.+)_lora\.alpha", "alpha"), (r"(?:unet\.)?(.+)\.lora\.alpha", "alpha"),
    (UNET + r"(.+)\.alpha", "alpha"),
)]
TEXT_ENCODER = re.compile(r"(lora_te\d?_.+?|text_encoder.+?|base_model\.model\.text_model.+?)(\.lora.*|_lora\..*|\.alpha)")


def peft_alpha(path: Path, metadata: dict[str, str]):
    """PEFT keeps alpha outside the tensors: in the header (diffusers) or in adapter_config.json beside the file (peft
    itself). Returns alpha(flat name, rank), for layers that have no alpha of their own: what is said there, or rank."""
    try:
        beside = Path(path).with_name("adapter_config.json")
        said = json.loads(metadata.get("lora_adapter_metadata") or (beside.read_text() if beside.is_file() else "{}"))
        said = {key.removeprefix("unet."): value for key, value in said.items()}
        alphas = {flat(name): float(alpha) for name, alpha in (said.get("alpha_pattern") or {}).items()}
        default, rs = said.get("lora_alpha"), said.get("use_rslora")          # rsLoRA: scale = alpha / sqrt(rank)
    except (ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"{path}: its PEFT settings (in its header, or adapter_config.json beside it) cannot be read ({error}); save the LoRA again") from None

    def alpha(name, rank):
        own = next((a for pattern, a in alphas.items() if name.endswith(pattern)), default)
        return float(rank if own is None else own * rank ** 0.5 if rs else own)
    return alpha


def save(path: Path, lora: dict[str, Factors], metadata: dict[str, str]):
    """Writes kohya style, which diffusers, ComfyUI, A1111 and kohya all read, fp32, with metadata (str -> str): the
    caller's, and what tells those programs which rank and which family of models this is."""
    tensors = {}
    for name, f in lora.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = f.down.float().reshape(len(f.down), -1, *f.kernel).contiguous()
        tensors[f"lora_unet_{name}.lora_up.weight"] = f.up.float().reshape(*f.up.shape, *[1] * len(f.kernel)).contiguous()
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(f.alpha)
    ranks = sorted({f.down.shape[0] for f in lora.values()})
    alphas = sorted({f.alpha for f in lora.values()})
    one = lambda values: f"{values[0]:g}" if len(values) == 1 else "Dynamic"
    header = {"ss_network_module": "networks.lora", "ss_network_dim": one(ranks), "ss_network_alpha": one(alphas),
              "modelspec.sai_model_spec": "1.0.1", "modelspec.title": Path(path).stem}
    family = FAMILIES.get(prompt_width({name: f.down.shape[1] for name, f in lora.items()}))
    if family:
        v = family[2] == "sd_v2" and metadata.get("prediction_type") == "v_prediction"
        header |= {"modelspec.architecture": ("stable-diffusion-v2-768-v" if v else family[1]) + "/lora",
                   "ss_base_model_version": family[2] + "_v" * v, **({"ss_v2": "True"} if family[2] == "sd_v2" else {})}
    save_tensors(path, tensors, {**header, **metadata})


class LoRAFile:
    """A LoRA file of any of the four styles, block names by level or numbered through. Its header is read at once:
    .metadata and .shapes {name: (r, O, I)}; its layers when they are asked for, so that 700 files need not be in memory.

    A missing alpha means scale 1 (PEFT: what its settings say). Text-encoder layers are left out, with a note on stderr that counts them. Raises
    BadInput, naming the file, if it cannot be read, holds no UNet LoRA, holds keys of no known style or has half a pair.
    """

    def __init__(self, path: Path):
        self.path, self.keys, self.shapes, sizes = path, {}, {}, {}
        text_layers, peft = set(), False
        with opened(path) as file:
            self.metadata = file.metadata() or {}
            for key in file.keys():
                if hit := TEXT_ENCODER.fullmatch(key):
                    text_layers.add(hit[1])
                    continue
                sizes[key] = file.get_slice(key).get_shape()
                hits = ((pattern.fullmatch(key), part) for pattern, part in STYLES)
                hit, part = next(((h, part) for h, part in hits if h), (None, None))
                if hit is None:
                    raise BadInput(f"{path}: key {key!r} {sizes[key]} belongs to no known LoRA style; is this a plain LoRA for a UNet?")
                peft = peft or ".lora_A." in key
                name = flat(unet_name(".".join(hit.groups())))
                name += "_0" if name.endswith("to_out") else ""      # old files leave out to_out's index
                self.keys.setdefault(name, {})[part] = key
        self.alpha_of = peft_alpha(path, self.metadata) if peft else lambda name, rank: float(rank)
        for name, key in self.keys.items():
            down, up = sizes.get(key.get("down"), []), sizes.get(key.get("up"), [])
            if not {len(down), len(up)} <= {2, 4} or math.prod(up[1:]) != down[0]:
                raise BadInput(f"{path}: {name} is not a matching pair of LoRA factors; the file is damaged or of another kind")
            self.shapes[name] = (down[0], up[0], math.prod(down[1:]))
        if not self.keys:
            raise BadInput(f"{path}: holds no LoRA for a UNet ({len(text_layers)} layers of text encoders); "
                           "give a file written by train.py or merge.py")
        if text_layers:
            print(f"note: {path}: its {len(text_layers)} text-encoder layers are left out, only the UNet's part is used", file=sys.stderr)

    def read(self, names) -> dict[str, Factors]:
        """Those of its layers. Raises BadInput if one is not finite."""
        lora = {}
        with opened(self.path) as file:
            for name in (name for name in names if name in self.keys):
                p = {part: file.get_tensor(key).clone() for part, key in self.keys[name].items()}   # so that no file stays mapped
                alpha = p["alpha"].flatten()[0].item() if "alpha" in p else self.alpha_of(name, len(p["down"]))
                if not (math.isfinite(alpha) and p["down"].isfinite().all() and p["up"].isfinite().all()):
                    raise BadInput(f"{self.path}: {name} holds NaN or infinity; train this expert again")
                lora[name] = Factors(p["down"].float().flatten(1), p["up"].float().flatten(1), alpha, tuple(p["down"].shape[2:]))
        return lora


def load(path: Path) -> tuple[dict[str, Factors], dict[str, str]]:
    """(lora, metadata) of a whole file. Raises BadInput as LoRAFile does."""
    file = LoRAFile(path)
    return file.read(file.shapes), file.metadata


def read(arguments: list[str], network: nn.Module) -> tuple[dict[str, Factors] | None, list[str]]:
    """["A", "B@0.5"] -> their sum as one LoRA for this network (a meta one will do), None for no argument; and what to
    call each, "name@strength". Raises BadInput as load() and match() do."""
    loras, strengths, names = [], [], []
    for argument in arguments:
        name, at, strength = argument.rpartition("@")
        name, strength = (name, strength) if at else (argument, "1")
        try:
            strengths.append(float(strength))
            if not math.isfinite(strengths[-1]):
                raise ValueError
        except ValueError:
            raise BadInput(f"--lora {argument}: {strength!r} is not a number; write FILE@0.5") from None
        loras.append(match(network, load(Path(name))[0], name))
        names.append(f"{Path(name).name}@{strengths[-1]:g}")
    return (compose(loras, strengths) if loras else None), names
