"""What becomes of a kernel that cannot be compiled."""

from pathlib import Path

import pytest

from switch_bank.ops import cpu_kernels


@pytest.mark.skipif(not cpu_kernels.RUN, reason="needs AVX2, Linux and a C++ compiler")
def test_a_kernel_that_does_not_compile_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bank_cpu.cpp"
    broken.write_text("int main() { return nothing; }")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=r"(?s)bank_cpu.cpp; --model.bank-backend grouped does.*nothing"):
        cpu_kernels.load(broken, instead="--model.bank-backend grouped")
    assert not list((tmp_path / "cache").glob("*.so"))
