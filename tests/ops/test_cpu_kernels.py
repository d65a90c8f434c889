"""When a kernel is compiled, and what becomes of one that cannot be."""

from pathlib import Path

import pytest

from switch_bank.ops import cpu_kernels

needs_compiler = pytest.mark.skipif(not cpu_kernels.RUN, reason="needs AVX2, Linux and a C++ compiler")


@needs_compiler
def test_a_kernel_that_does_not_compile_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bank_cpu.cpp"
    broken.write_text("int main() { return nothing; }")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=r"(?s)bank_cpu.cpp; --model.bank-backend grouped does.*nothing"):
        cpu_kernels.load(broken, advice="--model.bank-backend grouped does without it")
    assert not list((tmp_path / "cache").glob("*.so"))


@needs_compiler
def test_a_kernel_is_compiled_once_and_again_when_what_it_includes_is_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, header, cache = tmp_path / "own.cpp", tmp_path / "own.h", tmp_path / "cache"
    source.write_text('#include "own.h"\n')
    monkeypatch.setattr(cpu_kernels, "HEADER", header)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    libraries = []
    for text in ("int one() { return 1; }", "int one() { return 1; }", "int two() { return 2; }"):
        header.write_text(text)
        cpu_kernels.load.__wrapped__(source, advice="none")
        libraries.append(len(list(cache.glob("own_*.so"))))
    assert libraries == [1, 1, 2]


@needs_compiler
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_is_compiled_ahead_is_not_compiled_again_and_its_errors_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, broken, cache = tmp_path / "good.cpp", tmp_path / "broken.cpp", tmp_path / "cache"
    good.write_text("int one() { return 1; }")
    broken.write_text("int main() { return nothing; }")
    monkeypatch.setattr(cpu_kernels, "SOURCES", [good, broken])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    for thread in cpu_kernels.compile_ahead():
        thread.join()
    assert sorted(capfd.readouterr().err.splitlines()) == ["compiling broken.cpp, once", "compiling good.cpp, once"]
    cpu_kernels.load.__wrapped__(good, advice="none")
    assert not capfd.readouterr().err
    with pytest.raises(RuntimeError, match="does not compile broken.cpp; none"):
        cpu_kernels.load.__wrapped__(broken, advice="none")
