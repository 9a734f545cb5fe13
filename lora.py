"""LoRA by hand: inject, switch, extract, stack, compress.

What it is:  low-rank adaptation (Hu et al. 2021, 2106.09685) of a network's linear layers:
                 y = W x + s * B (A x),      s = alpha / rank,      delta W = s * B A
             A ("down") [rank, in], B ("up") [out, rank]; W stays frozen.
Needs:       torch alone.
Gives:       init(), inject(), extract(), switched_off(), rows(); stack(), compose(), compress().

A convolution is a linear layer over the pixels under its kernel: A [r, I*k*k]. Letters: r rank, I
and O a layer's input and output width, k a kernel's side, N the rows that a layer multiplies.
"""
import contextlib
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# The projections of every self- and cross-attention (attn1, attn2), as in the released code.
TARGETS = re.compile(r"attn[12]\.to_(q|k|v|out\.0)$")


class Factors(NamedTuple):
    """One adapted layer: delta W = alpha / rank * up @ down. A LoRA is {flat name: Factors}."""
    down: torch.Tensor              # A [r, I], of a convolution [r, I*k*k]
    up: torch.Tensor                # B [O, r]
    alpha: float
    kernel: tuple[int, ...] = ()    # (k, k) where a file keeps the factors as convolutions

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)

    def delta(self) -> torch.Tensor:
        """Dense delta W [O, I(*k*k)]: large, and avoided where factors will do."""
        return (self.up @ self.down).mul_(self.scale)


def flat(name: str) -> str:
    """A module's name as LoRA files of kohya's kind spell it: with underscores for dots."""
    return name.replace(".", "_")


def layers(network: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """{flat name: (name, layer)} of all that a LoRA can adapt."""
    return {flat(name): (name, module) for name, module in network.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))}


class LoRALayer(nn.Module):
    """A frozen layer with a LoRA beside it (README, eq. 5); with `on` False the layer alone."""

    def __init__(self, base: nn.Linear | nn.Conv2d, factors: Factors):
        super().__init__()
        self.base, self.scale, self.on = base, factors.scale, True
        # Master copies: fp32, as factors are, whatever the network's own precision is.
        self.down = nn.Parameter(factors.down.to(base.weight.device))
        self.up = nn.Parameter(factors.up.to(base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if not self.on:
            return y
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(self.base, nn.Linear):
            # The scale multiplies the narrow one of the two: it is cheap there.
            return y + F.linear(self.scale * F.linear(x, down), up)
        down = down.view(-1, *self.base.weight.shape[1:])              # [r, I, k, k]
        narrow = F.conv2d(x, down, None, self.base.stride, self.base.padding)
        return y + F.conv2d(self.scale * narrow, up[:, :, None, None])


def init(network: nn.Module, rank: int, alpha: float, rng: torch.Generator) -> dict[str, Factors]:
    """A fresh LoRA: A ~ N(0, 1/rank^2), PEFT's "gaussian", as in the released code; B = 0, so that
    delta W is 0 and B alone has a gradient. Experts that share an A would merge badly."""
    return {flat(name): Factors(torch.randn(rank, layer.in_features, generator=rng) / rank,
                                torch.zeros(layer.out_features, rank), float(alpha))
            for name, layer in network.named_modules() if TARGETS.search(name)}


def inject(network: nn.Module, lora: dict[str, Factors]) -> list[nn.Parameter]:
    """Puts a LoRA that fits (model/formats/fit.py) into the network and freezes everything else.
    Returns its parameters (A, B, A, B ...)."""
    network.requires_grad_(False)
    parameters, adaptable = [], layers(network)
    for key, factors in lora.items():
        name, layer = adaptable[key]
        injected = LoRALayer(layer, factors)
        network.set_submodule(name, injected)
        parameters += [injected.down, injected.up]
    return parameters


def extract(network: nn.Module) -> dict[str, Factors]:
    """The injected LoRA, on the CPU."""
    return {flat(name): Factors(layer.down.detach().cpu(), layer.up.detach().cpu(),
                                layer.scale * len(layer.down), tuple(layer.base.weight.shape[2:]))
            for name, layer in network.named_modules() if isinstance(layer, LoRALayer)}


@contextlib.contextmanager
def switched_off(network: nn.Module):
    """Inside, the network is the base model: a reference without a second copy of the weights."""
    adapted = [module for module in network.modules() if isinstance(module, LoRALayer)]
    for layer in adapted:
        layer.on = False
    try:
        yield
    finally:
        for layer in adapted:
            layer.on = True


def rows(layer: nn.Linear | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """What a layer multiplies by its weights, fp32: its input's tokens [N, I], or the pixels under
    the kernel at each place [N, I*k*k]."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2).float()
    patches = F.unfold(x.float(), layer.kernel_size, padding=layer.padding, stride=layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def stack(parts: list[Factors], weights: list[float]) -> Factors:
    """Sum of w_i delta W_i of ONE layer, exactly: [w_1 s_1 B_1, ...] [A_1; ...] (README, eq. 6).
    Ranks add up. Adding or averaging the factors themselves would leave cross terms B_i A_j."""
    down, up = torch.cat([f.down for f in parts]), torch.cat([f.up for f in parts], dim=1)
    scales = torch.tensor([w * f.scale for f, w in zip(parts, weights)])
    up *= scales.repeat_interleave(torch.tensor([f.down.shape[0] for f in parts]))
    return Factors(down, up, float(len(down)), parts[0].kernel)    # alpha = rank: scale 1


def compose(loras: list[dict[str, Factors]], weights: list[float]) -> dict[str, Factors]:
    """stack() of every layer. A layer that only some of the LoRAs adapt keeps theirs."""
    composed = {}
    for name in dict.fromkeys(name for lora in loras for name in lora):
        holders = [i for i, lora in enumerate(loras) if name in lora]
        composed[name] = stack([loras[i][name] for i in holders], [weights[i] for i in holders])
    return composed


def thin_qr(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, R) with x = Q R. Where x is not taller than wide, Q is 1: there is nothing to gain."""
    return torch.linalg.qr(x) if len(x) > x.shape[1] else (torch.eye(len(x)), x)


def leading_directions(core: torch.Tensor, rank: int) -> torch.Tensor:
    """Q [m, 2 rank + 16], orthonormal, which nearly spans the first `rank` left singular vectors of
    the core [m, n]: random directions, six times by core core^T (Halko et al. 2009, 0909.4061)."""
    Q = torch.randn(len(core), 2 * rank + 16, generator=torch.Generator().manual_seed(0))
    for _ in range(6):
        Q = torch.linalg.qr(core @ (core.T @ Q)).Q
    return Q


def compress(f: Factors, rank: int) -> tuple[Factors, torch.Tensor, torch.Tensor]:
    """The closest delta W of at most this rank (Eckart & Young 1936; README, eq. 7), its energy
    |delta W|^2 [], and that of f []; their difference is the squared distance. With thin QRs
    B = Q_B R_B and A^T = Q_A R_A it is enough to decompose the small core s R_B R_A^T; a large one
    (of ties, dare, hundreds of experts) is first projected on its leading directions."""
    Q_B, R_B = thin_qr(f.up)
    Q_A, R_A = thin_qr(f.down.T)
    core = f.scale * (R_A.T if torch.equal(Q_B, R_B) else R_B @ R_A.T)    # B = 1: dense
    energy = core.square().sum()
    if min(core.shape) > 500 + 4 * rank:    # measured: a smaller SVD takes milliseconds
        Q = leading_directions(core, rank)
        Q_B, core = Q_B @ Q, Q.T @ core
    U, S, V = torch.linalg.svd(core, full_matrices=False)    # core = U S V
    root = S[:rank].sqrt()    # half of S to each factor: both of a size that fp16 can hold
    down, up = root[:, None] * (V[:rank] @ Q_A.T), Q_B @ U[:, :rank] * root
    return Factors(down, up, float(len(root)), f.kernel), S[:rank].square().sum(), energy
