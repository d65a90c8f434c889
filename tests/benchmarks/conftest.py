"""What the tests of the benchmarks share: running one of their programs in this process."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch


class Finished(NamedTuple):
    exit_code: int | str | None
    out: str
    err: str


@pytest.fixture
def program(monkeypatch, capsys) -> Iterator[Callable[..., Finished]]:
    """program(module, *arguments): what `python -m module arguments` does. What it sets in torch is set back."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    filled = torch.utils.deterministic.fill_uninitialized_memory

    def run(module: ModuleType, *arguments: str) -> Finished:
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        try:
            exit_code: int | str | None = module.main()
        except SystemExit as left:
            exit_code = left.code
        return Finished(exit_code, *capsys.readouterr())

    yield run
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)
    torch.utils.deterministic.fill_uninitialized_memory = filled
