"""Several processes at one task: `torchrun --nproc_per_node=N train.py ...`; without torchrun, one process alone.

What it is:  who is who, for make_data.py too; and for train.py, data parallelism by hand. Every process (a rank) holds
             the whole model and takes its share of a step's pairs; gradients are summed over ranks, so that all take the
             same step. A LoRA's gradients are a few MB: one sum a step costs nothing beside the UNet, and hiding it
             behind the backward pass would gain nothing.
Needs:       torch; the environment that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK).
Gives:       share(), local_device(); start(), which sets RANK and WORLD; add_up(), wait().
"""
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from .files import BadInput

RANK, WORLD = 0, 1  # this process's number, and how many there are, once start() was called


def share() -> tuple[int, int]:
    """(rank, world): this process is number `rank` of `world` that run the same command, as torchrun says by the
    variables RANK and WORLD_SIZE; (0, 1) without them. Raises BadInput if they contradict each other."""
    given = [os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")]
    if not all(text.isdecimal() for text in given) or int(given[0]) >= int(given[1]):
        raise BadInput(f"RANK={given[0]} WORLD_SIZE={given[1]}: RANK counts from 0 to WORLD_SIZE - 1; let torchrun set both, or unset them")
    return int(given[0]), int(given[1])


def local_device(name: str) -> str:
    """--device, where "auto" and "cuda" mean the GPU that torchrun gives to this process (LOCAL_RANK), if there is one."""
    local = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{local}" if local.isdecimal() and name in ("auto", "cuda") and torch.cuda.is_available() else name


def start(device: torch.device) -> torch.device:
    """Meets the other processes, over NCCL on CUDA and gloo elsewhere. Returns the device, which it makes the current one."""
    global RANK, WORLD
    RANK, WORLD = share()
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Hours: while one rank reads the pictures the others wait.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    return device


def add_up(tensors: list[torch.Tensor]):
    """Each tensor becomes its sum over all processes, in place: one message for them all."""
    if WORLD == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(total.view_as(tensor))


def wait():
    """Returns when every process has come here."""
    if WORLD > 1:
        dist.barrier()
