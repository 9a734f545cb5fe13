"""LoRA by hand: inject, switch, fuse, compose, compress.

What it is:  low-rank adaptation (Hu et al. 2021, 2106.09685) of a network's linear layers:
                 y = W x + s * B (A x),      s = alpha / rank,      delta W = s * B A
             A ("down") [rank, in], B ("up") [out, rank]. W stays frozen; B starts at zero, so a fresh
             LoRA changes nothing.
Needs:       torch; model/lora_file.py, which knows how files spell it and gives Factors, load() and save().
Gives:       a LoRA in memory is a dict {flat module name: Factors}; init(), inject(), switched_off(), fuse(), stack(),
             compose(), compress(), match(), and read() of several files at strengths.

A convolution is a linear layer over the pixels under its kernel: its A is [rank, in * kernel area], and all algebra
below holds for it unchanged. Letters: r rank, I and O a layer's input and output width, k k a kernel's sides.
"""
import contextlib
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model.files import BadInput
from model.lora_file import FAMILIES, Factors, LoRAFile, expand, flat, load, prompt_width, save  # noqa: F401 (lora.save() and others)

# The projections of every self- (attn1) and cross-attention (attn2), as in the released SafetyDPO code.
TARGETS = re.compile(r"attn[12]\.to_(q|k|v|out\.0)$")


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


def read(arguments: list[str], network: nn.Module) -> tuple[dict[str, Factors] | None, list[str], list[Path]]:
    """["A", "B@0.5"] -> (their sum as one LoRA for this network (a meta one will do), None for no argument; what to call
    each, "name@strength"; their files). Raises BadInput as load() and match() do."""
    loras, strengths, names, files = [], [], [], []
    for argument in arguments:
        name, at, strength = argument.rpartition("@")
        name, strength = (name, strength) if at else (argument, "1")
        try:
            strengths.append(float(strength))
            if not math.isfinite(strengths[-1]):
                raise ValueError
        except ValueError:
            raise BadInput(f"--lora {argument}: {strength!r} is not a number; write FILE@0.5") from None
        files.append(Path(name))
        loras.append(match(network, load(files[-1])[0], name))
        names.append(f"{Path(name).name}@{strengths[-1]:g}")
    return (compose(loras, strengths) if loras else None), names, files
