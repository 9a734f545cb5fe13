"""Several processes train one LoRA: `torchrun --nproc_per_node=N train.py ...`; without torchrun, one process alone.

What it is:  data parallelism by hand. Every process (a rank) holds the whole model and takes its share of a step's
             pairs; gradients are summed over ranks, so that all take the same step. A LoRA's gradients are a few MB:
             one sum a step costs nothing beside the UNet, and hiding it behind the backward pass would gain nothing.
Needs:       torch; the environment that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK).
Gives:       WORLD, RANK, start(), add_up(), wait().
"""
import os
from datetime import timedelta

import torch
import torch.distributed as dist

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


def start(device: torch.device) -> torch.device:
    """Meets the other processes, over NCCL on CUDA and gloo elsewhere. Returns this process's own device."""
    if WORLD == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():          # hours: while one rank reads the pictures the others wait
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
