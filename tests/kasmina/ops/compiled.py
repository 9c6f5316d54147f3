"""Compiles the kernels for devices that are not here, and prints what became of them, one JSON object per kernel.

`python -m tests.kasmina.ops.compiled`. Triton brings its own assembler, so a machine without a GPU can tell whether the
launches compile, spill registers or load in narrow pieces; only their speed it cannot tell. Launches are turned into
compilations, so what is compiled is exactly what a device would run.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from esper.kasmina.ops import _blend_kernel, _health_kernel

_OBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _Absent:
    """Stands for a device of some compute capability."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, _device: int) -> int:
        return 0


def _listing(kernel, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([_OBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def _describe(label: str, name: str, kernel) -> dict:
    usage, code = _listing(kernel, "-res-usage"), _listing(kernel, "-sass")
    return {
        "launch": label,
        "kernel": name,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "shared": kernel.metadata.shared,
        "wide": len(re.findall(r"LDG(?:STS)?\.E\.\S*128", code)),
    }


def main() -> None:
    """Compile for two generations, the older with copies to shared memory that the kernel's pipeline uses."""
    compiled = {}
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled[self.__name__] = launch(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    x = torch.empty(4096, 1024, dtype=torch.bfloat16)
    image = torch.empty(64, 256, 28, 28)
    alphas = torch.empty(2)
    launches = {
        "blend": lambda: _blend_kernel.forward(x, [x, x], alphas),
        "blend backward": lambda: _blend_kernel.backward(x, [x, x], alphas),
        "health, features last": lambda: _health_kernel.statistics(x, -1, 0.0, 128, 0),
        "blend and health, features second": lambda: _health_kernel.blended_statistics(
            image, [image, image], alphas, 1, 0.0, 128, 0
        ),
        "blend of eight and health": lambda: _health_kernel.blended_statistics(
            image, [image] * 8, alphas, 1, 0.0, 128, 0
        ),
    }
    older = ["blend and health, features second"]
    for capability, labels in ((90, list(launches)), (80, older)):
        driver.set_active(_Absent(capability))
        for label in labels:
            compiled.clear()
            launches[label]()
            for name, kernel in compiled.items():
                json.dump({"capability": capability, **_describe(label, name, kernel)}, sys.stdout)
                print(flush=True)


if __name__ == "__main__":
    main()
