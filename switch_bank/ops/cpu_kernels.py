"""C++ kernels for CPUs with AVX2 or AVX-512: compiled once on a machine, and kept with torch's compiled code."""

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

SOURCES = sorted(Path(__file__).parent.glob("*_cpu.cpp"))
HEADER = Path(__file__).with_suffix(".h")  # what they have in common
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
# Read once: compiled code may not ask.
CAPABILITY = torch.backends.cpu.get_cpu_capability()
RUN = platform.system() == "Linux" and CAPABILITY in ("AVX2", "AVX512") and COMPILER is not None
BF16 = RUN and CAPABILITY == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def compile_ahead() -> list[threading.Thread]:
    """Begins to compile the kernels that lie in no cache yet, beside what the caller does next. Returns the threads
    that wait for the compilers: daemons, as a program that ends with an error must not wait for them."""
    threads = [threading.Thread(target=_compile_quietly, args=(source,), daemon=True) for source in SOURCES if RUN]
    for thread in threads:
        thread.start()
    return threads


@functools.cache
def load(source: Path, advice: str) -> None:
    """Registers the operators of a C++ file, which is compiled first if this version lies in no cache yet. Raises
    RuntimeError with `advice` and the compiler's words if it does not compile."""
    torch.ops.load_library(str(_compiled(source, advice)))


def _compile_quietly(source: Path) -> None:
    with contextlib.suppress(RuntimeError, OSError):  # `load` says it, where the kernel is wanted
        _compiled(source, advice="")


def _compiled(source: Path, advice: str) -> Path:
    """The library. Compiling takes some 11 s of a core."""
    torch_folder = Path(torch.__file__).parent
    flags = ["-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-mavx2", "-mfma", "-mf16c"]
    if CAPABILITY == "AVX512":
        flags += [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")] + ["-mavx512bf16"] * BF16
        flags += ["-mprefer-vector-width=512"]
    flags += ["-DAT_PARALLEL_OPENMP=1", f"-DCPU_CAPABILITY={CAPABILITY}", f"-DCPU_CAPABILITY_{CAPABILITY}"]
    flags += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    key_of = [source.read_text(), HEADER.read_text(), torch.__version__, *flags]
    key = hashlib.sha256("\n".join(key_of).encode()).hexdigest()[:16]
    library = Path(cache_dir()) / f"{source.stem}_{key}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes and threads one compiles; a lock dies with its process
        if not library.exists():
            print(f"compiling {source.name}, once", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                built = Path(folder) / library.name
                assert COMPILER is not None
                command = [COMPILER, str(source), "-o", str(built), *flags]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{COMPILER} does not compile {source.name}; {advice}:\n{done.stderr[-2000:]}")
                os.replace(built, library)
    return library
