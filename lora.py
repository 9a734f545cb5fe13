"""LoRA by hand: inject, switch, extract, stack, compress.

What it is:  low-rank adaptation (Hu et al. 2021, 2106.09685) of a network's linear layers:
                 y = W x + s * B (A x),      s = alpha / rank,      delta W = s * B A
             A ("down") [rank, in], B ("up") [out, rank]. W stays frozen; B starts at zero, so a
             fresh LoRA changes nothing.
Needs:       torch alone.
Gives:       a LoRA in memory is a dict {flat module name: Factors}; init(), inject(), extract(),
             switched_off(), rows(), stack(), compose(), compress().

A convolution is a linear layer over the pixels under its kernel: its A is [rank, in * kernel area],
and all algebra below holds for it unchanged. Letters: r rank, I and O a layer's input and output
width, k k a kernel's sides, N the rows that a layer multiplies.
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
    """One adapted layer: delta W = (alpha / rank) * up @ down."""
    down: torch.Tensor              # A [r, I], of a convolution [r, I*k*k]
    up: torch.Tensor                # B [O, r]
    alpha: float
    kernel: tuple[int, ...] = ()    # (k, k) where a file keeps the factors as convolutions

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]

    def delta(self) -> torch.Tensor:
        """Dense delta W [O, I(*k*k)]. For tests and fusing; methods that can, avoid it."""
        return self.scale * (self.up @ self.down)


def flat(name: str) -> str:
    return name.replace(".", "_")


def layers(network: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """{flat name: (name, layer)} of all that a LoRA can adapt."""
    return {flat(name): (name, module) for name, module in network.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))}


class LoRALayer(nn.Module):
    """A frozen linear layer or convolution with a LoRA beside it (README, eq. 5). With `on` False
    it is the frozen layer, bit for bit."""

    def __init__(self, base: nn.Linear | nn.Conv2d, factors: Factors):
        super().__init__()
        self.base, self.scale, self.on = base, factors.scale, True
        # master copies: fp32, as factors are, whatever the network's own precision is
        self.down = nn.Parameter(factors.down.to(base.weight.device))
        self.up = nn.Parameter(factors.up.to(base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if not self.on:
            return y
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(self.base, nn.Linear):
            # the scale, where it is cheap
            return y + F.linear(self.scale * F.linear(x, down), up)
        down = down.view(-1, *self.base.weight.shape[1:])              # [r, I, k, k]
        narrow = F.conv2d(x, down, None, self.base.stride, self.base.padding)
        return y + F.conv2d(self.scale * narrow, up[:, :, None, None])

    def factors(self) -> Factors:
        down, up = self.down.detach().cpu(), self.up.detach().cpu()
        return Factors(down, up, self.scale * len(down), tuple(self.base.weight.shape[2:]))


def init(network: nn.Module, rank: int, alpha: float,
         random: torch.Generator) -> dict[str, Factors]:
    """A fresh LoRA: A ~ N(0, 1/rank^2), B = 0. So delta W is 0, and B alone has a gradient.

    Give every expert its OWN generator: experts that share an A are correlated, and merge badly.
    """
    return {flat(name): Factors(torch.randn(rank, layer.in_features, generator=random) / rank,
                                torch.zeros(layer.out_features, rank), float(alpha))
            for name, layer in network.named_modules() if TARGETS.search(name)}


def inject(network: nn.Module, lora: dict[str, Factors]) -> list[nn.Parameter]:
    """Puts a LoRA that fits (model/formats/fit.py) into the network and freezes everything else.
    Returns its parameters (A, B, A, B ...)."""
    network.requires_grad_(False)
    parameters, known = [], layers(network)
    for key, factors in lora.items():
        name, layer = known[key]
        injected = LoRALayer(layer, factors)
        network.set_submodule(name, injected)
        parameters += [injected.down, injected.up]
    return parameters


def extract(network: nn.Module) -> dict[str, Factors]:
    """The injected LoRA, on the CPU."""
    return {flat(name): module.factors() for name, module in network.named_modules()
            if isinstance(module, LoRALayer)}


@contextlib.contextmanager
def switched_off(network: nn.Module):
    """Inside, the network is the base model: the DPO reference costs no second copy of the
    weights."""
    switches = [module for module in network.modules() if isinstance(module, LoRALayer)]
    for layer in switches:
        layer.on = False
    try:
        yield
    finally:
        for layer in switches:
            layer.on = True


def rows(layer: nn.Linear | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """What a layer multiplies by its weights, [N, I] or [N, I*k*k], fp32: its input's tokens, or
    the pixels under the kernel at each place."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2).float()
    patches = F.unfold(x.float(), layer.kernel_size, padding=layer.padding, stride=layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def stack(parts: list[Factors], weights: list[float]) -> Factors:
    """Sum of w_i * delta W_i of ONE layer as one pair of factors, exactly (README, eq. 6): ranks
    add up, because

        [w_1 s_1 B_1, ..., w_n s_n B_n] [A_1; ...; A_n] = sum_i w_i s_i B_i A_i.

    Adding or averaging the factors themselves instead would leave cross terms B_i A_j.
    """
    down = torch.cat([f.down for f in parts])
    up = torch.cat([w * f.scale * f.up for f, w in zip(parts, weights)], dim=1)
    return Factors(down, up, float(len(down)), parts[0].kernel)    # alpha = rank: scale 1


def compose(loras: list[dict[str, Factors]], weights: list[float]) -> dict[str, Factors]:
    """stack() of every layer. A layer that only some of the LoRAs adapt keeps theirs."""
    holders = {}    # {name: [(factors, weight)]}
    for lora, weight in zip(loras, weights):
        for name, factors in lora.items():
            holders.setdefault(name, []).append((factors, weight))
    return {name: stack(*zip(*pairs)) for name, pairs in holders.items()}


def thin_qr(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q, R with x = Q R. Q is 1 where x is not taller than wide: the core of very many stacked
    experts is then no larger than delta W."""
    return torch.linalg.qr(x) if len(x) > x.shape[1] else (torch.eye(len(x)), x)


def compress(f: Factors, rank: int) -> tuple[Factors, torch.Tensor, torch.Tensor]:
    """The closest delta W of at most this rank (Eckart & Young 1936; README, eq. 7), its energy
    |delta W|^2, and that of f, [] each. f's energy less its own is the squared distance to f.

    Never by the SVD of a dense delta W where f has a lower rank: with thin QRs B = Q_B R_B and
    A^T = Q_A R_A, all that is left to decompose is the small core s R_B R_A^T. Of a large core (of
    ties, dare, or hundreds of experts), only what lies in the span of its first singular vectors,
    nearly: that of random directions, multiplied again and again (Halko et al. 2009, 0909.4061).
    """
    Q_B, R_B = thin_qr(f.up)
    Q_A, R_A = thin_qr(f.down.T)
    core = f.scale * R_B @ R_A.T
    energy = core.square().sum()
    # Measured: below this bound the SVD takes milliseconds, or is about as fast.
    if min(core.shape) > 500 + 4 * rank:
        # more directions than asked for, since the last ones are the least exact
        Q = torch.randn(len(core), 2 * rank + 16, generator=torch.Generator().manual_seed(0))
        for _ in range(6):
            Q = torch.linalg.qr(core @ (core.T @ Q)).Q
        Q_B, core = Q_B @ Q, Q.T @ core
    U, S, V = torch.linalg.svd(core, full_matrices=False)    # core = U S V
    root = S[:rank].sqrt()    # half of S to each factor: both of a size that fp16 can hold
    down, up = root[:, None] * (V[:rank] @ Q_A.T), Q_B @ U[:, :rank] * root
    return Factors(down, up, float(len(root)), f.kernel), S[:rank].square().sum(), energy
