"""A run that was killed while it compiled does not break the next one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from switch_bank.compiled_code import remove_half_written

COMPILES = """
import torch
from switch_bank.compiled_code import remove_half_written

if {remove}:
    remove_half_written()
print(torch.compile(lambda x: x.sin() + 1)(torch.zeros(64))[0].item())
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache" / "ab").mkdir(parents=True)
    return tmp_path / "cache"


def test_what_a_killed_linker_left_goes_and_what_is_whole_or_being_linked_stays(cache: Path) -> None:
    contents = {"empty.so": b"", "headless.so": bytes(8192), "whole.so": b"\x7fELF" + bytes(8192), "source.cpp": b""}
    for name, content in contents.items():
        (cache / "ab" / name).write_bytes(content)
        os.utime(cache / "ab" / name, (1, 1))
    (cache / "ab" / "being_linked.so").touch()
    remove_half_written()
    assert {file.name for file in (cache / "ab").iterdir()} == {"whole.so", "source.cpp", "being_linked.so"}


@pytest.mark.slow
def test_a_half_written_library_is_compiled_again(cache: Path) -> None:
    def compiles(remove: bool) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", COMPILES.format(remove=remove)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert compiles(remove=True).stdout == "1.0\n"
    (library,) = cache.glob("*/*.main.so")
    library.write_bytes(b"")
    os.utime(library, (1, 1))
    assert "file too short" in compiles(remove=False).stderr
    assert compiles(remove=True).stdout == "1.0\n"
