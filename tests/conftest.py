"""What all tests share: the hypothesis profiles, small models, and processes that work together.

CI draws the same examples in every run.
"""

import email
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import settings

from switch_bank.config import Config, presets
from switch_bank.data import write_shard
from switch_bank.distributed import World, start
from switch_bank.model.gpt import SwitchBankGPT
from tests.runs import EOD, byte_documents, tiny, train

# As `set_numerics` has it, before the first product: the processes that tests start inherit it and must sum alike.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session")
def config_of() -> Callable[..., Config]:
    """config_of(**options): a nano of three layers' width 32 and a vocabulary of 97, with `options` of the model."""

    def config(**options: Any) -> Config:
        small: dict[str, Any] = dict(
            vocab_size=97, eod_token=0, layers=3, width=32, heads=2, window=128, experts=4, expert_width=16,
            value_embeddings=1, dtype="float32", ema_stride=2, opening_tokens=16, reverse_window=48, score="softmax",
        )  # fmt: skip
        nano = presets["nano"]
        return replace(nano, model=replace(nano.model, **(small | options))).check()

    return config


@pytest.fixture(scope="session")
def model_of() -> Callable[[Config], SwitchBankGPT]:
    """model_of(config): a model whose every parameter is random; what starts at zero would hide what it multiplies."""

    def model(config: Config) -> SwitchBankGPT:
        built = SwitchBankGPT(config.model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, part in built.named_parameters():
                matrix = part.ndim >= 2 and "embedding" not in name and "scalars" not in name
                scale = part.shape[-1] ** -0.5 if matrix and not name.startswith("bank.adapters") else 0.3
                # λ₀ and the scales of adapters lie around 1, so that nothing fades away over the layers.
                around = 1.0 if name in ("scalars", "bank.adapters.scale") else 0.0
                part.copy_(around + scale * torch.randn(part.shape, generator=generator))
            built.embedding.weight.mul_(3)
            built.head.mul_(4)
        return built

    return model


@pytest.fixture
def world() -> Iterator[World]:
    """A process group of this process alone."""
    yield start()
    dist.destroy_process_group()


def _process(rank: int, processes: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    torch.save(work(World(rank, processes, torch.device("cpu")), *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # one in some hundred such processes was seen to abort in a thread of torch's while Python winds down


@pytest.fixture(scope="session")
def on_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """on_processes(P, work, *arguments): what work(world, *arguments), a function of a module, returns on each of P
    processes that work together."""
    parent = tmp_path_factory.mktemp("processes")

    def run(processes: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        folder = tempfile.mkdtemp(dir=parent)
        mp.spawn(_process, args=(processes, folder, work, arguments), nprocs=processes)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(processes)]

    return run


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The email package's sources, a byte a token: two training files and one to validate on."""
    folder = tmp_path_factory.mktemp("shards with spaces äöü")
    files = sorted(Path(email.__file__).parent.glob("*.py"))
    write_shard(folder / "train_000000.bin", byte_documents(files[1::3], EOD))
    write_shard(folder / "train_000001.bin", byte_documents(files[2::3], EOD))
    write_shard(folder / "val_000000.bin", byte_documents(files[0::3], EOD))
    return folder


@pytest.fixture(scope="session")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished run of 50 steps on one process; the checkpoint before its last one is of step 40."""
    out = tmp_path_factory.mktemp("runs") / "one"
    options = ["--run.steps", "50", "--run.val-at-steps", "10", "25", "--run.checkpoint-every", "20", "--run.profile"]
    result = train([*tiny(shards), *options], out)
    assert result.returncode == 0, result.stderr
    return out, result
