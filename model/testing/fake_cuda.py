"""The scripts on a CUDA device that is not there, so that a mixed device or dtype is found without
a GPU: `python -m model.testing.fake_cuda "bf16 train --device cuda --steps 2" "fp16 merge a b"`

What it is:  tensors on "cuda" have shape and dtype, and no numbers (torch's FakeTensor); what is
             copied to the CPU is ones. What a GPU would refuse raises: tensors of two devices, or a
             product of two dtypes. Training of several steps is stopped after the first one, and
             continued. A line starts with bf16, or with fp16, as of a GPU that lacks it.
Needs:       Linux, g++, pytest, a torch built without CUDA.
"""
import contextlib
import ctypes
import importlib
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock


def load_guard():
    """Compiles fake_cuda.cpp and loads it: before torch is imported, which asks at once, and once
    only, whether there is CUDA."""
    torch, source = Path(importlib.util.find_spec("torch").origin).parent, Path(__file__)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fake_cuda.so"
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", "-I", torch / "include",
                        source.with_suffix(".cpp"), "-o", library], check=True)
        ctypes.CDLL(str(torch / "lib/libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


load_guard()

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
# What takes tensors of one dtype alone on a GPU. FakeTensor does not ask.
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.native_group_norm,
            aten.native_layer_norm)


def ones(value):
    """What a fake tensor on the CPU stands for: ones. All else as it is."""
    if isinstance(value, FakeTensor) and value.device.type == "cpu":
        return torch.ones(value.shape, dtype=value.dtype)
    return value


def refuse_mixing(function, tensors):
    devices = {tensor.device.type for tensor in tensors if tensor.ndim}    # a CPU's scalar may join
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if len(devices) > 1 and function.overloadpacket != aten.copy_:
        raise RuntimeError(f"{function}: tensors on {devices}")
    if len(dtypes) > 1 and function.overloadpacket in PRODUCTS:
        raise RuntimeError(f"{function}: tensors of {dtypes}")


class FakeCUDA(TorchDispatchMode):
    """Inside, whatever touches "cuda" is fake, and the CPU computes as ever."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode()

    def faked(self, value):
        real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return self.fake.from_tensor(value) if real else value

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if FakeTensor not in types and (device is None or device.type != "cuda"):
            return function(*args, **kwargs)
        values, form = tree_flatten((args, kwargs))
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        refuse_mixing(function, tensors)
        if function.overloadpacket == aten._local_scalar_dense:    # item()
            return torch.ones((), dtype=args[0].dtype).item()
        fake_args, fake_kwargs = tree_unflatten([self.faked(value) for value in values], form)
        with self.fake:
            result = function(*fake_args, **fake_kwargs)
        if function.overloadpacket == aten.copy_:
            return args[0]
        return tree_map(ones, result)


def check():
    """The guard must notice what it is for."""
    cpu, cuda = torch.ones(2, 2), torch.ones(2, 2, device="cuda")
    with pytest.raises(RuntimeError, match="tensors on"):
        cpu + cuda
    with pytest.raises(RuntimeError, match="tensors of"):
        cuda @ cuda.half()


def run(name: str, *argv: str):
    script = importlib.import_module(name)
    arguments = script.parse_arguments(argv)
    if name == "train" and arguments.steps > 1:
        save_state = script.save_state

        def stop(*state):
            save_state(*state)
            raise KeyboardInterrupt

        with mock.patch.multiple(script, SAVE_EVERY=1, save_state=stop):
            with contextlib.suppress(KeyboardInterrupt):
                script.main(arguments)
    script.main(arguments)


def main(*lines: str):
    tolist = torch.Tensor.tolist
    cuda = mock.patch.multiple(torch.cuda, _lazy_init=lambda: None, is_available=lambda: True)
    numbers = mock.patch.object(torch.Tensor, "tolist", lambda tensor: tolist(tensor.cpu()))
    # FakeTensorMode remembers tensors weakly, and module.to() does not like that.
    swap = mock.patch("weakref.getweakrefs", lambda value: [])
    torch._C._set_only_lift_cpu_tensors(True)    # torch.tensor(..., device="cuda") passes by here
    # FakeTensorMode is this thread's alone.
    alone = mock.patch("model.tools.processes.in_threads", map)
    with cuda, numbers, swap, alone, FakeCUDA():
        check()
        for line in lines:
            half, *words = line.split()
            bf16 = lambda including_emulation=True: half == "bf16"
            with mock.patch.object(torch.cuda, "is_bf16_supported", bf16):
                run(*words)
            print(f"ran {line}")


if __name__ == "__main__":
    main(*sys.argv[1:])
