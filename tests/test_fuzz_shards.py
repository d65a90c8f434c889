"""Shards from strangers: a file of any content under any name is read as a shard or refused in one line.

Any exception but that refusal fails a test, and so does a crash of the process.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_bank.data import MAGIC, VERSION, DataError, Shards, write_shard
from tests.strangers import MANY, assert_one_clear_line

VOCABULARY = 300
INT32 = st.integers(-(2**31), 2**31 - 1)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1) | st.integers(0, 65_535), max_size=8)


def open_shard(path: Path) -> None:
    """A file is used if and only if it is a shard, and then it is read to its last token."""
    raw = path.read_bytes()
    header, tokens = raw[:1024], np.frombuffer(raw[1024 : len(raw) - len(raw) % 2], "<u2")
    is_shard = len(raw) == 1024 + 2 * len(tokens) and len(tokens) > 0 and (tokens < VOCABULARY).all()
    is_shard = is_shard and np.frombuffer(header, "<i4")[:3].tolist() == [MAGIC, VERSION, len(tokens)]
    try:
        shards = Shards.open(str(path), VOCABULARY)
    except DataError as error:
        assert not is_shard
        assert_one_clear_line(error, str(path))
    else:
        assert is_shard
        assert np.array_equal(shards.read(0, 2 * len(tokens)), [*tokens, *tokens])


@pytest.mark.parametrize("cases", [60, MANY])
def test_a_file_of_any_content_is_a_shard_or_refused(cases: int, tmp_path: Path) -> None:
    path = tmp_path / "train_0.bin"
    number_of_tokens = st.integers(-1, 9) | INT32

    @settings(max_examples=cases)
    @given(st.just(MAGIC) | INT32, st.just(VERSION) | INT32, number_of_tokens, TOKENS, st.binary(max_size=3))
    def check(magic: int, version: int, count: int, tokens: list[int], rest: bytes) -> None:
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, count
        path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes() + rest)
        open_shard(path)

    check()


@pytest.mark.parametrize("cases", [60, MANY])
def test_a_shard_with_bytes_changed_cut_off_or_added_is_read_as_it_is_or_refused(cases: int, tmp_path: Path) -> None:
    path = tmp_path / "train_0.bin"
    whole = 1024 + 2 * 40

    @settings(max_examples=cases)
    @given(st.dictionaries(st.integers(0, whole - 1), st.integers(0, 255), max_size=3), st.integers(0, whole + 4))
    def check(changes: dict[int, int], size: int) -> None:
        write_shard(path, np.arange(40))
        raw = bytearray(path.read_bytes())
        for at, byte in changes.items():
            raw[at] = byte
        path.write_bytes(raw)
        os.truncate(path, size)
        open_shard(path)

    check()


@pytest.mark.parametrize("cases", [60, MANY])
def test_a_pattern_of_any_characters_finds_shards_or_is_refused(cases: int, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.arange(40))
    write_shard(tmp_path / "ä b.bin", np.arange(40))
    (tmp_path / "folder.bin").mkdir()
    write_shard(tmp_path / "folder.bin" / "a.bin", np.arange(40))
    (tmp_path / "nowhere.bin").symlink_to("nothing")

    @settings(max_examples=cases)
    @given(st.text(st.sampled_from("abinÄä ?*[]!-./\\\n\0\ud800{}$~")) | st.text() | st.text("*?/a", max_size=200))
    def check(pattern: str) -> None:
        if ".." in pattern:
            return  # would leave the folder
        try:
            shards = Shards.open(f"{tmp_path}/{pattern}", VOCABULARY)
        except DataError as error:
            assert_one_clear_line(error, about=str(tmp_path))
        else:
            assert shards.total == 40 * len(shards.paths) > 0

    check()


def test_a_header_that_promises_terabytes_takes_no_memory_and_no_time(tmp_path: Path) -> None:
    path = tmp_path / "train_0.bin"
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, 2**31 - 1
    for size in (1024, 2**42):  # the second one is a file of holes
        path.write_bytes(header.tobytes())
        os.truncate(path, size)
        with pytest.raises(DataError, match=rf"2147483647 tokens \(4294968318 bytes\) but the file has {size} bytes"):
            Shards.open(str(path), VOCABULARY)
