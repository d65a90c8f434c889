"""Checkpoints: what was saved comes back to the bit, and a file that cannot be trusted is refused with advice."""

import hashlib
import io
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switch_bank.checkpoint import MAGIC, CheckpointError, copy_to_host, load, require_like, save


def state_of(step: int = 7) -> dict[str, Any]:
    """All kinds of things that a run's state is made of."""
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(3, 40, generator=generator)
    weights[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return {
        "step": step, "seconds": 0.1 + 0.2, "name": "nano äöü", "nothing": None, "flag": True,
        "readings": [60.0, 120.0], "times_resumed": 2, "log_sizes": {"log.txt": 5}, "clip": {"norms": weights[1]},
        "picks": weights, "muon": {"state": {}}, "loads": {}, "data": [[5, "f0"]], "adam": {"groups": [{"lr": 0.1}]},
        "model": {"weights": weights, "half": weights.bfloat16(), "pruned": weights[0] > 0, "scalar": torch.tensor(3)},
        "optimizer": {"state": {0: {"momentum": weights.T}}, "groups": [{"lr": 0.1, "betas": (0.8, 0.95)}]},
        "config": {"activation": [[0, 0.125], [75, 1.0]]},
    }  # fmt: skip


def same(one: Any, two: Any) -> bool:
    """Equal in type and value, tensors to the bit."""
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        bits = [part.contiguous().flatten().view(torch.uint8) for part in (one, two)]
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*bits)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pt"


def test_a_state_comes_back_to_the_bit(path: Path) -> None:
    save(path, state_of())
    assert same(load(path), state_of()) and not same(load(path), state_of(8))
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_an_optimizers_state_comes_back_and_takes_the_same_step(path: Path) -> None:
    parameters = [torch.nn.Parameter(torch.ones(4, 3))]
    adam = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    parameters[0].grad = torch.randn(4, 3)
    adam.step()
    save(path, state_of() | {"model": {"weights": parameters[0].detach()}, "adam": adam.state_dict()})
    adam.step()
    saved = load(path)
    again = [torch.nn.Parameter(saved["model"]["weights"])]
    resumed = torch.optim.AdamW(again, lr=9.0, fused=True)
    resumed.load_state_dict(saved["adam"])
    again[0].grad = parameters[0].grad
    resumed.step()
    assert torch.equal(again[0], parameters[0])


def test_the_one_before_is_kept_beside_it(path: Path) -> None:
    previous = path.with_name("checkpoint.pt.previous")
    for step in range(3):
        save(path, state_of(step))
        assert load(path)["step"] == step
        assert load(previous)["step"] == step - 1 if step else not previous.exists()
    assert {file.name for file in path.parent.iterdir()} == {path.name, previous.name}


def test_the_one_before_is_kept_where_a_file_can_have_one_name_only(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    test_the_one_before_is_kept_beside_it(path)


def test_a_save_that_was_killed_leaves_the_state_before_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, state_of(1))
    leftover = path.with_name("checkpoint.pt.tmp")
    leftover.write_bytes(path.read_bytes()[:500])
    assert load(path)["step"] == 1
    save(path, state_of(2))
    assert load(path)["step"] == 2 and not leftover.exists()

    # At every rename the state before is still there under its own name.
    replace = os.replace
    for allowed in (0, 1):
        renames = iter(range(allowed))

        def killed(source: Path, target: Path, renames: Any = renames) -> None:
            if next(renames, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(path, state_of(3))
        assert load(path)["step"] == 2


@pytest.mark.parametrize("room", [10, 300, 2000, 3600])
def test_a_full_disk_leaves_the_state_before_it_and_takes_no_room(path: Path, room: int) -> None:
    save(path, state_of(1))
    save(path, state_of(2))
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert len(before[path.name]) > room
    free, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(
            OSError, match=f"^{path} cannot be written, File too large: what was saved before it stays; "
        ):
            save(path, state_of(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


@given(data=st.data())
def test_one_damaged_byte_is_found_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "checkpoint.pt"
    save(path, state_of())
    content = bytearray(path.read_bytes())
    # The newline after the checksum is layout alone: it says nothing that could be wrong.
    at = data.draw(st.integers(0, len(content) - 1).filter(lambda index: index != len(MAGIC) + 64))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged, its" if at >= len(MAGIC) else "is not a SwitchBank"):
        load(path)


@pytest.mark.parametrize("kept", [0, 1, len(MAGIC) - 1, len(MAGIC), len(MAGIC) + 30, len(MAGIC) + 65, 1000, -1])
def test_a_truncated_file_is_refused(path: Path, kept: int) -> None:
    save(path, state_of())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is .*: there is no older one, start a new run"):
        load(path)


def test_a_foreign_file_is_refused(path: Path) -> None:
    torch.save(state_of(), path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is not a SwitchBank checkpoint: there is no older one"):
        load(path)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"there is no checkpoint {path}: there is no older one, start a new run"
    ):
        load(path)


def test_the_one_before_is_offered_where_the_last_one_cannot_be_used(path: Path) -> None:
    for step in range(2):
        save(path, state_of(step))
    for content in (path.read_bytes()[:-1], b"something else"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt\.previous; rename it to checkpoint\.pt to resume"):
            load(path)
    path.with_name("checkpoint.pt.previous").rename(path)
    assert load(path)["step"] == 0


def folder(path: Path) -> None:
    path.mkdir()


def link_to_nowhere(path: Path) -> None:
    path.symlink_to("nothing")


def file_that_gives_errors(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (folder, "is no file"),
        (os.mkfifo, "is no file"),
        (link_to_nowhere, "is no file"),
        (file_that_gives_errors, "cannot be read, Input/output error"),
    ],
)
def test_what_is_no_file_that_can_be_read_is_refused(path: Path, make: Callable[[Path], None], message: str) -> None:
    make(path)
    with pytest.raises(CheckpointError, match=rf"checkpoint\.pt {message}: there is no older one, start a new run"):
        load(path)


def paths_in(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value inside nested dicts, lists and tuples."""
    if isinstance(state, dict | list | tuple):
        for key in state if isinstance(state, dict) else range(len(state)):
            yield (*path, key)
            yield from paths_in(state[key], (*path, key))


def changed(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the state with another value at `path`."""
    if not path:
        return value
    if isinstance(state, dict):
        return state | {path[0]: changed(state[path[0]], path[1:], value)}
    return type(state)(changed(item, path[1:], value) if at == path[0] else item for at, item in enumerate(state))


def test_a_state_that_is_not_built_like_the_run_s_own_is_refused_by_the_part_that_differs() -> None:
    own = state_of()
    require_like(state_of(8) | {"step": own["step"]}, own, "run")  # other numbers in the same places
    others = [
        False, "text", -9, [], (), {"weights": 1}, [[0, 0.125]], torch.zeros(3, 41), torch.zeros(3, 40).double(),
        torch.zeros(3, 40, device="meta"), torch.zeros(3, 40).to_sparse(),
    ]  # fmt: skip
    for path in paths_in(own):
        for other in others:
            with pytest.raises(CheckpointError) as error:
                require_like(changed(own, path, other), own, "run")
            name = ".".join(map(str, ("run", *path)))
            assert f"its {name} is another" in str(error.value) or f"its {name}." in str(error.value)


def test_an_optimizer_that_has_taken_no_step_fits_one_that_has() -> None:
    own = {"state": {0: {"momentum": torch.ones(2)}}, "groups": [{"lr": 0.1}]}
    require_like(own | {"state": {}}, own, "adam")
    with pytest.raises(CheckpointError, match=r"its adam\.groups is another"):
        require_like(own | {"groups": []}, own, "adam")


class Code:
    """Would make a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_file_does_not_run(path: Path) -> None:
    buffer, trace = io.BytesIO(), path.parent / "it ran"
    torch.save({"step": 1, "more": Code(trace)}, buffer)
    payload = buffer.getvalue()
    path.write_bytes(MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
    with pytest.raises(CheckpointError, match="holds other things than tensors and plain values"):
        load(path)
    assert not trace.exists()
    torch.load(io.BytesIO(payload), weights_only=False)  # the file is a trap indeed
    assert trace.exists()


def test_a_copy_to_the_host_stays_what_it_was() -> None:
    state = state_of()
    copied = copy_to_host(state)
    assert same(copied, state)
    state["model"]["weights"].zero_()
    state["optimizer"]["groups"][0]["lr"] = 1.0
    state["readings"].pop()
    assert same(copied, state_of())
