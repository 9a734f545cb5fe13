"""Which device computes, in which precision, and how memory is laid out there.

Needs:       torch.
Gives:       device_and_precision() for scripts; pick_device(), precision(), layout().
"""
import torch

from model.tools import processes
from model.tools.command import BadInput

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto" is cuda, then mps, then cpu. Raises BadInput for a device that torch lacks."""
    if name == "auto":
        gpu = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else gpu
    try:
        probe = torch.zeros(1, device=name)
        probe.item()    # refuses "meta", where tensors have shapes and no numbers
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {name}: {reason}; use cpu, cuda or auto") from None


def precision(device: torch.device, wanted: str) -> str:
    """Of frozen weights and of autocast. wanted: of --precision. "auto" is bf16 on a GPU
    (fp16 where bf16 would be emulated), at half the memory; else fp32."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def layout(dtype: torch.dtype) -> torch.memory_format:
    """Of convolutions' weights, which their answers take over: in half precision channels last, as
    GPUs want it, and faster on a CPU with AMX (model/lab/results.md); in fp32 it gains nothing."""
    return torch.preserve_format if dtype == torch.float32 else torch.channels_last


def device_and_precision(name: str, wanted: str) -> tuple[torch.device, str]:
    """What --device and --precision mean here: under torchrun this process's own GPU, and fp32,
    bf16 or fp16 in place of "auto", since finished work is reused for one precision only."""
    device = pick_device(processes.local_device(name))
    return device, precision(device, wanted)
