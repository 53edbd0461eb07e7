"""Compile the kernels that the head launches on CUDA; Triton's compiler and ptxas need no GPU.

`tile_pass` itself launches them, on CPU tensors and with a driver that accepts the kernels and runs none, so the
compiled kernels are those that a GPU would get. Prints a JSON line for each kernel.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from trl_emguard.ops import tiles_triton


# Each case: vocabulary, direction, softcap, dtype of the biases, and if there is a reference. Vocabularies belong to
# Qwen 2.5 (loads of 16 bytes), GPT-2 (rows not aligned to 16 bytes) and a toy model.
CASES = [
    *itertools.product([152064], ["reverse", "forward"], [None, 30.0], [None, torch.bfloat16], [True]),
    (152064, "reverse", None, None, False),
    (152064, "reverse", 30.0, torch.float32, False),
    (50257, "reverse", None, None, True),
    (97, "forward", 30.0, torch.float16, True),
]
N = 3


class NoGpu:
    """Driver without a GPU, with all that Triton asks of a driver."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 48 * 2**10},  # size available on every GPU
        load_binary=lambda *args: (object(), object(), 0, 0, 1024),
        unload_module=lambda module: None,
    )

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # Triton keeps the kernels of each device apart

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, src, metadata):
        return lambda *args: None


def launch(vocab, direction, softcap, bias_dtype, with_reference):
    def bias():
        return None if bias_dtype is None else torch.zeros(vocab, dtype=bias_dtype)

    products, target, weights = torch.zeros(N, vocab), torch.zeros(N, dtype=torch.long), torch.ones(N)
    ref = (torch.zeros(N, vocab), bias()) if with_reference else (None, None)
    tiles_triton.tile_pass(
        products,
        bias(),
        *ref,
        target,
        weights,
        weights if with_reference else None,
        direction,
        softcap,
        logit_scale=1.0,
    )


def report(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    wide = {f"wide_{kind}": len(re.findall(rf"{kind}\.global\.v4", ptx)) for kind in ("ld", "st")}
    return {"shared": kernel.metadata.shared, "fused": "fma.rn.f32" in ptx, **used, **wide}


for arch in map(int, sys.argv[1:]):
    driver.set_active(NoGpu(arch))
    for case in CASES:
        launch(*case)
    functions = [value for value in vars(tiles_triton).values() if isinstance(value, triton.JITFunction)]
    for function in functions:
        kernels = function.device_caches[arch][0].values()
        if not kernels:  # a part of other kernels, which is not launched by itself
            continue
        for case, kernel in zip(CASES, kernels, strict=True):
            print(json.dumps({"arch": arch, "kernel": kernel.name, "case": [str(x) for x in case], **report(kernel)}))
