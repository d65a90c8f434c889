"""Triton kernels without a GPU: their values from Triton's interpreter, their registers from a compilation to sm_90.

The interpreter takes the place of the compiler for a whole process. So tests of values are marked `gpu`, for a GPU runs
them as they are, and `run_interpreted` runs a file's marked tests in a process of its own on the CPU.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
TRITON_VERSION = triton.__version__
INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA GPU or the interpreter"),
]
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter takes the compiler's place")


def run_interpreted(file: str) -> None:
    """Runs a test file's tests marked `gpu` in the interpreter, and fails if one of them fails or none ran."""
    command = [sys.executable, "-m", "pytest", file, "-m", "gpu", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout, result.stdout


class Compiled(NamedTuple):
    registers: int  # of a thread
    spilled: int  # bytes that registers had no room for
    shared: int  # bytes of shared memory
    ptx: str

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.spilled} bytes spilled, {self.shared} bytes of shared memory"


def compile_for_hopper(kernel: Any, folder: Path, options: dict[str, int], **values: Any) -> Compiled:
    """A kernel as an H100 would run it. options: num_warps and such. values: by parameter, a type such as "*bf16" or
    "i32", for which pointers and integers divide by 16, as those of the trainer's shapes do; or a value to compile in,
    as Triton does with a 1."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = list(inspect.signature(kernel.fn).parameters)
    typed = {name: values[name] for name in names if isinstance(values[name], str)}
    constants = {name: values[name] for name in names if name not in typed}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in typed.items() if kind.startswith("*") or kind == "i32"
    }  # fmt: skip
    source = ASTSource(kernel, {name: typed.get(name, "constexpr") for name in names}, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = folder / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    ptxas = get_ptxas(90).path
    command = [ptxas, "-v", "-arch=sm_90a", str(ptx), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (stores,), (loads,), (registers,) = (
        re.findall(pattern, said)
        for pattern in (r"(\d+) bytes spill stores", r"(\d+) bytes spill loads", r"Used (\d+) registers")
    )
    return Compiled(int(registers), int(stores) + int(loads), compiled.metadata.shared, compiled.asm["ptx"])


def _multiply_bfloat16() -> None:
    """Triton 3.6's interpreter multiplies the bit patterns of bfloat16, and rounds to it by cutting digits off."""
    from triton.runtime import interpreter

    multiply, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
    language = triton.language

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (language.bfloat16, language.float32):
            return torch.from_numpy(data.copy()).view(torch.bfloat16).float().numpy()
        if (source, target) == (language.float32, language.bfloat16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, rounding)

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(convert_float(part.data, part.dtype, language.float32, None), language.float32)
            if part.dtype == language.bfloat16 else part
            for part in (a, b)
        )  # fmt: skip
        return multiply(builder, a, b, *rest)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    _multiply_bfloat16()
