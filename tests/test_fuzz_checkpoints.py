"""Checkpoints from strangers: nothing in one runs, hangs or crashes; it is a run's state or refused in one line.

Any exception but that refusal fails a test, and so does a crash of the process.
"""

import codecs
import contextlib
import dataclasses
import functools
import hashlib
import io
import operator
import os
import pickle
import runpy
import subprocess
import tarfile
import timeit
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_bank import checkpoint
from switch_bank.checkpoint import CheckpointError
from switch_bank.config import presets
from tests.strangers import MANY, PLAIN, assert_one_clear_line


def state() -> dict[str, Any]:
    """All PARTS of a small run's state."""
    matrix = torch.nn.Parameter(torch.ones(3, 4))
    adam = torch.optim.AdamW([{"params": [matrix], "name": "matrices"}], betas=(0.8, 0.95), fused=True)
    matrix.grad = torch.ones(3, 4)
    adam.step()
    return {
        "config": dataclasses.asdict(presets["nano"]), "step": 7, "seconds": 1.5, "readings": [60.0],
        "times_resumed": 0, "log_sizes": {"log.txt": 5, "metrics.jsonl": 0}, "muon": {},
        "model": torch.nn.Linear(2, 3).state_dict(), "adam": adam.state_dict(), "clip": {"norms": torch.ones(2)},
        "picks": torch.ones(2, 3).bfloat16(), "loads": {}, "data": [],
    }  # fmt: skip


def packed(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def repacked(changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive of a good state, some of whose entries are others."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed(state()))) as good, zipfile.ZipFile(buffer, "w", compression) as forged:
        for name in good.namelist():
            forged.writestr(name, changes.get(name.split("/", 1)[1], good.read(name)))
        for name, content in changes.items():
            if f"archive/{name}" not in good.namelist():
                forged.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def sealed(payload: bytes) -> bytes:
    """A checkpoint whose checksum holds, whatever is in it."""
    return checkpoint.MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


def load_checkpoint(path: Path, content: bytes) -> Any:
    """What is loaded has all parts of a run's state; None where it is refused."""
    path.write_bytes(content)
    try:
        loaded = checkpoint.load(path)
    except CheckpointError as error:
        assert_one_clear_line(error, str(path))
        return None
    assert all(isinstance(loaded[part], kind) for part, kind in checkpoint.PARTS.items())
    return loaded


@pytest.mark.parametrize("cases", [100, MANY])
def test_a_file_of_any_bytes_is_no_checkpoint(cases: int, tmp_path: Path) -> None:
    beginnings = st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", checkpoint.MAGIC])

    @settings(max_examples=cases)
    @given(beginnings, st.binary(max_size=300), st.booleans())
    def check(beginning: bytes, rest: bytes, with_checksum: bool) -> None:
        content = beginning + rest
        assert load_checkpoint(tmp_path / "checkpoint.pt", sealed(content) if with_checksum else content) is None

    check()


@pytest.mark.parametrize("every", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_a_checkpoint_cut_off_at_any_place_is_refused(every: int, tmp_path: Path) -> None:
    whole = sealed(packed(state()))
    for size in range(0, len(whole), every):
        assert load_checkpoint(tmp_path / "checkpoint.pt", whole[:size]) is None


@pytest.mark.parametrize("every", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_a_checkpoint_with_any_one_bit_changed_is_refused(every: int, tmp_path: Path) -> None:
    whole = sealed(packed(state()))
    for at in range(0, len(whole), every):
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        assert load_checkpoint(tmp_path / "checkpoint.pt", bytes(content)) is None


@pytest.mark.parametrize("cases", [100, MANY])
def test_bytes_changed_or_cut_off_before_the_checksum_was_made_are_read_or_refused(cases: int, tmp_path: Path) -> None:
    payload = packed(state())
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        pickle_end = payload.index(archive.read("archive/data.pkl")) + len(archive.read("archive/data.pkl"))
    # Half of the changes are in the pickle, where most of the decisions are made.
    place = st.integers(0, len(payload) - 1) | st.integers(0, pickle_end)

    @settings(max_examples=cases)
    @given(
        st.dictionaries(place, st.integers(0, 255), max_size=4), st.just(len(payload)) | st.integers(0, len(payload))
    )
    def check(changes: dict[int, int], size: int) -> None:
        content = bytearray(payload)
        for at, byte in changes.items():
            content[at] = byte
        load_checkpoint(tmp_path / "checkpoint.pt", sealed(bytes(content[:size])))

    check()


class Calls:
    """An object whose pickle calls `function(*arguments)` when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def traps(trace: Path) -> list[Any]:
    """Objects that make the file or folder `trace` when they are unpickled."""
    name, python = str(trace), f"open({str(trace)!r}, 'w').close()"
    return [
        Calls(os.system, f"touch '{name}'"), Calls(subprocess.call, ["touch", name]), Calls(os.mkdir, name),
        Calls(eval, python), Calls(exec, python), Calls(open, name, "w"), Calls(Path.touch, trace),
        Calls(os.open, name, os.O_CREAT), Calls(runpy._run_code, python, {}), Calls(codecs.open, name, "w"),
        Calls(list, Calls(map, eval, [python])), Calls(functools.partial(os.mkdir, name)), Calls(torch.save, 1, name),
        Calls(timeit.timeit, python, "pass", timeit.default_timer, 1), Calls(operator.methodcaller("touch"), trace),
        Calls(np.ndarray.tofile, np.zeros(1), name),
    ]  # fmt: skip


def remove(trace: Path) -> bool:
    """Whether it was there."""
    if trace.is_dir():
        trace.rmdir()
    elif trace.exists():
        trace.unlink()
    else:
        return False
    return True


def by_hand(trace: Path) -> list[bytes]:
    """Pickles as no pickler writes them, that call os.mkdir by each operation that can."""
    text = f"S{str(trace)!r}\n".encode()
    return [
        b"cposix\nmkdir\n(" + text + b"tR.",
        b"(" + text + b"iposix\nmkdir\n.",
        b"(cposix\nmkdir\n" + text + b"o.",
        b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93(" + text + b"tR.",
        b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'mkdir'\ntR(" + text + b"tR.",
        b"\x80\x02ctypes\nSimpleNamespace\n)R}S'__setstate__'\ncposix\nmkdir\nsb" + text + b"b.",
        b'\x80\x02}(cbuiltins\neval\n(S\'__import__("os").mkdir("' + str(trace).encode() + b"\")'\ntRK\x01u.",
    ]


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_the_traps_are_traps_for_python_s_own_pickle(protocol: int, tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    for pickled in [pickle.dumps(trap, protocol) for trap in traps(trace)] + by_hand(trace):
        with contextlib.suppress(TypeError, AttributeError):  # after it ran
            pickle.loads(pickled)
        assert remove(trace), pickled


@pytest.mark.parametrize("cases", [100, MANY])
def test_nothing_in_a_checkpoint_runs(cases: int, tmp_path: Path) -> None:
    trace, path = tmp_path / "it ran", tmp_path / "checkpoint.pt"

    def in_the_state(trap: Any, place: str, protocol: int) -> bytes:
        buffer = io.BytesIO()
        torch.save(state() | {place: trap}, buffer, pickle_protocol=protocol)
        return buffer.getvalue()

    def in_the_old_format(trap: Any, place: str, protocol: int) -> bytes:
        buffer = io.BytesIO()
        torch.save(state() | {place: trap}, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        return buffer.getvalue()

    def in_an_entry(trap: Any, place: str, protocol: int) -> bytes:
        return repacked({place: trap if isinstance(trap, bytes) else pickle.dumps(trap, protocol)})

    def as_script(trap: Any, place: str, protocol: int) -> bytes:
        content = trap if isinstance(trap, bytes) else pickle.dumps(trap, protocol)
        return repacked({"constants.pkl": content, "data.pkl": content, "code/__torch__.py": b"raise SystemExit(9)"})

    def bare(trap: Any, place: str, protocol: int) -> bytes:
        return trap if isinstance(trap, bytes) else pickle.dumps(trap, protocol)

    def as_tar(trap: Any, place: str, protocol: int) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in ("storages", "tensors", "pickle"):
                content = bare(trap, place, protocol)
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()

    objects = st.sampled_from(range(len(traps(trace)))).map(lambda index: traps(trace)[index])
    parts = st.sampled_from([*checkpoint.PARTS, "more"])
    entries = st.sampled_from(["data.pkl", "other.pkl", "constants.pkl", ".data/serialization_id", "version"])
    forged = st.one_of(
        st.builds(in_the_state, objects, parts, st.integers(2, 5)),
        st.builds(in_the_old_format, objects, parts, st.integers(2, 5)),
        *(
            st.builds(form, objects | st.sampled_from(by_hand(trace)), entries, st.integers(0, 5))
            for form in (in_an_entry, as_script, bare, as_tar)
        ),
    )

    @settings(max_examples=cases)
    @given(forged)
    def check(payload: bytes) -> None:
        load_checkpoint(path, sealed(payload))
        load_checkpoint(path, payload)
        assert not trace.exists()

    check()


@pytest.mark.parametrize("cases", [60, MANY])
def test_what_torch_saved_and_is_not_the_state_of_a_run_is_refused(cases: int, tmp_path: Path) -> None:
    leaf = PLAIN.filter(lambda value: value == value) | st.sampled_from(
        [torch.ones(2), torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.nn.Parameter(torch.ones(1))]
    )
    values = st.recursive(leaf, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner))

    @settings(max_examples=cases)
    @given(values | st.dictionaries(st.sampled_from(list(checkpoint.PARTS)), values))
    def check(content: Any) -> None:
        load_checkpoint(tmp_path / "checkpoint.pt", sealed(packed(content)))

    check()


def test_a_state_that_lacks_a_part_or_has_one_of_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    assert load_checkpoint(path, sealed(packed(state()))) is not None
    for part, kind in checkpoint.PARTS.items():
        others = [{name: value for name, value in state().items() if name != part}]
        others += [state() | {part: value} for value in (None, "text", {"text": 1} if kind is list else [["text"]])]
        for other in others:
            assert load_checkpoint(path, sealed(packed(other))) is None
    for seconds in (float("nan"), float("inf"), -1.0):
        assert load_checkpoint(path, sealed(packed(state() | {"seconds": seconds}))) is None
    for other in (state() | {"readings": [["text"]]}, [state()], torch.ones(3), 7, None):
        assert load_checkpoint(path, sealed(packed(other))) is None


def test_an_archive_that_unpacks_to_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    assert load_checkpoint(path, sealed(repacked({}))) is not None
    zeros = bytes(64 << 20)
    bombs = [
        repacked({}, zipfile.ZIP_DEFLATED),
        repacked({"more": zeros}, zipfile.ZIP_DEFLATED),
        repacked({"data.pkl": zeros}, zipfile.ZIP_DEFLATED),
    ]
    for bomb in bombs:
        assert load_checkpoint(path, sealed(bomb)) is None


def test_a_pickle_that_asks_for_slow_work_is_refused_at_once(tmp_path: Path) -> None:
    """Text of n characters takes Python's punycode codec, which torch lets pickles call, some n² steps."""
    text = "".join(chr(0x100 + 7919 * index % 50_000) for index in range(3000))
    text = text.encode("utf-8", "ignore").decode()
    slow = packed(state() | {"more": Calls(codecs.encode, text, "punycode")})
    assert load_checkpoint(tmp_path / "checkpoint.pt", sealed(slow)) is None
