"""Shards are checked before they are trusted, and every process count reads the same stream."""

import dataclasses
import hashlib
import itertools
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_bank.config import ModelConfig
from switch_bank.data import (
    IGNORED_TARGET,
    DataError,
    Shards,
    TokenStream,
    read_header,
    validation_batches,
    write_shard,
)
from switch_bank.model.features import documents_of
from switch_bank.ops.attention import build_mask

VOCABULARY = 50_257
EOD = 7


Counting = Callable[[list[int]], Shards]


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Counting:
    """counting(lengths): shards of these lengths whose tokens are their own stream positions."""
    parent = tmp_path_factory.mktemp("counting")

    def shards(lengths: list[int]) -> Shards:
        folder = Path(tempfile.mkdtemp(dir=parent))
        for number, (start, end) in enumerate(itertools.pairwise([0, *np.cumsum(lengths).tolist()])):
            write_shard(folder / f"{number}.bin", np.arange(start, end))
        return Shards.open(f"{folder}/*.bin", 65_536)

    return shards


def some_tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).astype(np.uint16)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "train_000000.bin"
    write_shard(path, some_tokens(1000))
    return path


def change(path: Path, offset: int, value: int, kind: str = "<i4") -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + np.dtype(kind).itemsize] = np.array(value, dtype=kind).tobytes()
    path.write_bytes(raw)


def test_a_shard_is_1024_bytes_of_header_and_two_bytes_a_token(shard: Path) -> None:
    raw = shard.read_bytes()
    assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240520, 1, 1000] + [0] * 253
    assert np.array_equal(np.frombuffer(raw[1024:], "<u2"), some_tokens(1000))
    assert read_header(shard) == 1000
    assert list(shard.parent.iterdir()) == [shard]


@pytest.mark.parametrize("tokens", [[70_000], [3, -1], [], [[1, 2]]])
def test_what_does_not_fit_a_shard_is_not_written(tmp_path: Path, tokens: list) -> None:
    with pytest.raises(DataError, match="x.bin"):
        write_shard(tmp_path / "x.bin", np.array(tokens, dtype=np.int64))
    assert not list(tmp_path.iterdir())


def test_files_are_read_in_name_order_with_their_checksums(tmp_path: Path) -> None:
    parts = [some_tokens(count, seed=count) for count in (300, 5, 1000)]
    for number, part in reversed(list(enumerate(parts))):
        write_shard(tmp_path / f"train_{number:06d}.bin", part)
    shards = Shards.open(str(tmp_path / "train_*.bin"), VOCABULARY)
    assert [Path(path).name for path in shards.paths] == [f"train_{number:06d}.bin" for number in range(3)]
    assert shards.lengths == [300, 5, 1000]
    assert shards.total == 1305
    assert shards.sha256 == [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in shards.paths]
    assert np.array_equal(shards.read(0, 1305), np.concatenate(parts))


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), start=st.integers(0, 500), count=st.integers(0, 300)
)
def test_reading_crosses_files_and_starts_over_at_the_end(
    counting: Counting, lengths: list[int], start: int, count: int
) -> None:
    shards = counting(lengths)
    assert shards.read(start, count).tolist() == [position % sum(lengths) for position in range(start, start + count)]


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches .*nothing_\*\.bin.*local_text\.py"):
        Shards.open(str(tmp_path / "nothing_*.bin"), VOCABULARY)


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (0, 20240801, "magic number 20240801"),
        (4, 2, "shard version 2"),
        (8, 1001, "1001 tokens (3026 bytes) but the file has 3024 bytes"),
        (8, 999, "999 tokens (3022 bytes) but the file has 3024 bytes"),
        (8, 0, "0 tokens"),
        (8, -5, "-5 tokens"),
    ],
)
def test_a_wrong_header_is_refused(shard: Path, offset: int, value: int, says: str) -> None:
    change(shard, offset, value)
    with pytest.raises(DataError, match=re.escape(says)) as caught:
        Shards.open(str(shard), VOCABULARY)
    assert str(shard) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 10, 1024, 3023])
def test_a_file_cut_short_is_refused(shard: Path, size: int) -> None:
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(DataError, match=f"{size} bytes"):
        read_header(shard)


@pytest.mark.parametrize("position", [0, 517, 999, 4_000_000])
def test_a_token_outside_the_vocabulary_is_found_wherever_it_is(tmp_path: Path, position: int) -> None:
    write_shard(tmp_path / "a.bin", some_tokens(100))
    bad = tmp_path / "b.bin"
    write_shard(bad, some_tokens(max(1000, position + 1)))
    change(bad, 1024 + 2 * position, VOCABULARY, "<u2")
    with pytest.raises(DataError, match=f"b.bin: token {VOCABULARY} at position {position} .*{VOCABULARY} tokens"):
        Shards.open(str(tmp_path / "*.bin"), VOCABULARY)
    Shards.open(str(tmp_path / "*.bin"), VOCABULARY + 1)


@settings(deadline=None, max_examples=50)
@given(
    data=st.data(),
    processes=st.integers(1, 6),
    rounds=st.integers(1, 3),
    together=st.integers(1, 3),
    blocks=st.integers(1, 3),
)
def test_a_step_reads_the_same_tokens_in_the_same_groups_on_any_number_of_processes(
    counting: Counting, data: st.DataObject, processes: int, rounds: int, together: int, blocks: int
) -> None:
    slices, slice_tokens = processes * rounds * together, 128 * blocks
    shards = counting(data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=4)))
    step = data.draw(st.integers(0, 20))
    inputs = torch.empty(slices, slice_tokens, dtype=torch.int64)
    targets = torch.empty_like(inputs)
    groups = []
    for rank in range(processes):
        stream = TokenStream(shards, slice_tokens, slices, rank, processes, "cpu", together)
        inputs[stream.own_slices], targets[stream.own_slices] = stream.batch(step)
        groups.append([group.tolist() for group in stream.own_slices.split(together)])
    # Group i is group i // P of process i mod P: interleaved, the groups are in the stream's order.
    in_order = [groups[i % processes][i // processes] for i in range(slices // together)]
    assert in_order == torch.arange(slices).view(-1, together).tolist()
    start = step * slices * slice_tokens
    expected = torch.arange(start, start + slices * slice_tokens + 1) % shards.total
    assert torch.equal(inputs.flatten(), expected[:-1])
    assert torch.equal(targets.flatten(), expected[1:])
    assert stream.epoch(step) == start // shards.total


def test_a_batch_depends_on_the_step_alone_whatever_was_read_before(counting: Counting) -> None:
    shards = counting([700, 1, 2500])
    fresh = {step: TokenStream(shards, 128, 4, 1, 2, "cpu").batch(step) for step in range(20)}
    stream = TokenStream(shards, 128, 4, 1, 2, "cpu")
    for step in [0, 1, 2, 2, 9, 10, 0, 19, 1, 0, 1, 2, 3]:
        inputs, targets = stream.batch(step)
        assert inputs.shape == targets.shape == (2, 128)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs, fresh[step][0])
        assert torch.equal(targets, fresh[step][1])


def test_a_batch_stays_what_it_was_while_the_next_ones_are_read(counting: Counting) -> None:
    stream = TokenStream(counting([5000]), 128, 2, 0, 1, "cpu")
    first = stream.batch(0)[0]
    copy = first.clone()
    for step in range(1, 5):
        stream.batch(step)
    assert torch.equal(first, copy)


@pytest.mark.parametrize(("total", "steps"), [(256, 0), (257, 1), (512, 1), (513, 2)])
def test_an_epoch_holds_the_steps_whose_last_target_is_still_in_it(counting: Counting, total: int, steps: int) -> None:
    stream = TokenStream(counting([total]), 128, 2, 0, 1, "cpu")
    assert stream.steps_in_one_epoch == steps
    read = torch.cat([stream.batch(step)[1].flatten() for step in range(steps + 1)])
    assert int((read == 0).nonzero()[0]) == total - 1  # the stream's first token is a target again
    assert steps * 256 <= total - 1 < (steps + 1) * 256


def test_an_error_while_reading_ahead_is_raised_for_the_step_it_belongs_to(counting: Counting) -> None:
    shards = counting([257, 255, 5000])
    stream = TokenStream(shards, 128, 2, 0, 1, "cpu")
    Path(shards.paths[1]).unlink()  # the second step's
    stream.batch(0)
    for _ in range(2):
        with pytest.raises(DataError, match="1.bin is no file"):
            stream.batch(1)
    assert stream.batch(2)[0][0, 0] == 512


def cut_short(path: Path) -> None:
    os.truncate(path, 2000)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 2)


def change_a_token(path: Path) -> None:
    change(path, 1024, 9, "<u2")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # clocks of file systems tick slowly


def replace_by_another_shard(path: Path) -> None:
    write_shard(path, some_tokens(999))


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_a_file_that_gives_errors(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to("/proc/self/mem")
    os.replace(link, path)  # at once: the thread that reads ahead must find one or the other


DAMAGES: dict[Callable[[Path], None], str] = {
    Path.unlink: "is no file",
    cut_short: "has changed since the run read it first: put the old file back and go on with --run.resume",
    cut_to_nothing: "has changed since",
    grow: "has changed since",
    change_a_token: "has changed since",
    replace_by_another_shard: "has changed since",
    replace_by_a_folder: "is no file",
    replace_by_a_pipe: "is no file",
    replace_by_a_file_that_gives_errors: "has changed since",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_is_damaged_while_the_run_reads_it_ends_the_reading(
    counting: Counting, damage: Callable[[Path], None]
) -> None:
    shards = counting([1000, 1000, 1000])
    stream = TokenStream(shards, 128, 1, 0, 1, "cpu")
    read = [stream.batch(step)[0] for step in range(7)]
    damage(Path(shards.paths[1]))
    with pytest.raises(DataError, match=DAMAGES[damage]) as error:
        for step in range(7, 20):
            read.append(stream.batch(step)[0])
    assert str(error.value).startswith(shards.paths[1]) and "\n" not in str(error.value)
    assert torch.equal(torch.cat(read).flatten(), torch.arange(len(read) * 128))  # what was read is right
    assert len(read) < 16


def test_a_shard_that_is_cut_short_in_the_middle_of_a_read_ends_the_reading(counting: Counting) -> None:
    shards = counting([1000, 1000])
    whole = Path(shards.paths[1]).stat()
    os.truncate(shards.paths[1], 2000)
    cut = Path(shards.paths[1]).stat()
    assert shards.states[1] == (whole.st_size, whole.st_mtime_ns)
    unnoticed = dataclasses.replace(shards, states=[shards.states[0], (cut.st_size, cut.st_mtime_ns)])
    with pytest.raises(DataError, match="1.bin was cut short while it was read; fetch or make the file again"):
        unnoticed.read(900, 1000)


UNREADABLE: dict[Callable[[Path], None], str] = {
    replace_by_a_folder: "is no file; leave it out of the pattern",
    replace_by_a_pipe: "is no file; leave it out of the pattern",
    replace_by_a_file_that_gives_errors: "cannot be read: Input/output error",
}


@pytest.mark.parametrize("damage", UNREADABLE)
@pytest.mark.parametrize("by_name", [True, False])
def test_what_is_named_like_a_shard_and_cannot_be_read_is_refused(
    shard: Path, damage: Callable[[Path], None], by_name: bool
) -> None:
    other = shard.with_name("train_000001.bin")
    other.touch()
    damage(other)
    with pytest.raises(DataError, match=f"{other} {UNREADABLE[damage]}"):
        Shards.open(str(other) if by_name else f"{shard.parent}/*.bin", VOCABULARY)


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").symlink_to(tmp_path / "nothing")
    (tmp_path / "b.bin").symlink_to(tmp_path / "b.bin")
    for pattern in ("a*", "b*"):
        with pytest.raises(DataError, match="is no file"):
            Shards.open(str(tmp_path / pattern), VOCABULARY)


@pytest.mark.parametrize("name", ["a b/c d.bin", "äöü/日本語.bin", "a\u3000b/🙂.bin", "-r/$HOME.bin", "%s/{}.bin"])
def test_names_may_hold_spaces_and_letters_of_any_language(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir()
    write_shard(tmp_path / name, some_tokens(300))
    for pattern in (tmp_path / name, tmp_path / "**" / "*.bin"):
        assert Shards.open(str(pattern), VOCABULARY).paths == [str(tmp_path / name)]


@pytest.mark.parametrize("name", [b"a\nb.bin", b"\xff.bin", b"\x1b[2J.bin", "\u2028.bin".encode()])
def test_names_that_a_line_of_the_log_cannot_hold_are_refused(tmp_path: Path, name: bytes) -> None:
    write_shard(tmp_path / os.fsdecode(name), some_tokens(300))
    for pattern in ("*.bin", os.fsdecode(name)):
        with pytest.raises(DataError, match="has characters that a line of text cannot hold") as error:
            Shards.open(str(tmp_path / pattern), VOCABULARY)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("slice_tokens", [0, 100, 129, -128])
def test_a_slice_that_is_no_multiple_of_128_is_refused(counting: Counting, slice_tokens: int) -> None:
    with pytest.raises(DataError, match=f"{slice_tokens} tokens is not a multiple of 128"):
        TokenStream(counting([5000]), slice_tokens, 2, 0, 1, "cpu")
    with pytest.raises(DataError, match=f"{slice_tokens} tokens is not a multiple of 128"):
        validation_batches(counting([5000]), 1000, slice_tokens, 1, 0, 1, EOD, "cpu")


@pytest.mark.parametrize(("slices", "processes", "together"), [(8, 3, 1), (2, 4, 1), (0, 1, 1), (8, 2, 3), (8, 4, 4)])
def test_processes_that_cannot_share_a_step_evenly_are_refused(
    counting: Counting, slices: int, processes: int, together: int
) -> None:
    with pytest.raises(DataError, match=f"{processes} processes cannot share {slices} slices"):
        TokenStream(counting([5000]), 128, slices, 0, processes, "cpu", together)


@settings(deadline=None, max_examples=50)
@given(
    val_tokens=st.integers(1, 3000),
    spare=st.integers(1, 300),
    blocks=st.integers(1, 4),
    slices_per_batch=st.integers(1, 4),
    processes=st.integers(1, 5),
)
def test_validation_predicts_each_of_the_first_tokens_once(
    counting: Counting, val_tokens: int, spare: int, blocks: int, slices_per_batch: int, processes: int
) -> None:
    shards = counting([val_tokens, spare])
    slice_tokens = 128 * blocks
    of_process = [
        list(validation_batches(shards, val_tokens, slice_tokens, slices_per_batch, rank, processes, EOD, "cpu"))
        for rank in range(processes)
    ]
    assert len({len(batches) for batches in of_process}) == 1
    assert all(x.shape == y.shape == (slices_per_batch, slice_tokens) for batches in of_process for x, y in batches)
    # Slice i of the whole is slice i // P of process i mod P: interleaved, the slices are in the stream's order.
    inputs, targets = (
        torch.stack([torch.cat([batch[which] for batch in batches]) for batches in of_process], dim=1).flatten()
        for which in (0, 1)
    )
    assert torch.equal(inputs[:val_tokens], torch.arange(val_tokens))
    assert torch.equal(targets[:val_tokens], torch.arange(1, val_tokens + 1))
    filling = [0] * (len(inputs) - val_tokens)
    if val_tokens % slice_tokens:
        filling[0] = EOD  # what fills up a short slice is a document of its own
    assert inputs[val_tokens:].tolist() == filling
    assert (targets[val_tokens:] == IGNORED_TARGET).all()
    assert len(inputs) - val_tokens < slices_per_batch * processes * slice_tokens


@pytest.mark.parametrize("eod", [0, EOD])
@pytest.mark.parametrize("val_tokens", [1, 127, 128, 300])
def test_every_attention_backend_takes_the_documents_of_batches_that_are_filled_up(
    counting: Counting, val_tokens: int, eod: int
) -> None:
    config = ModelConfig(vocab_size=VOCABULARY, eod_token=eod)
    for inputs, _ in validation_batches(counting([val_tokens, 1]), val_tokens, 128, 4, 0, 1, eod, "cpu"):
        for backend in ("reference", "flex", "triton", "flash"):
            build_mask(backend, documents_of(inputs, config).document, 128)


def test_fewer_validation_tokens_than_asked_says_how_many_there_are(counting: Counting) -> None:
    shards = counting([600, 400])
    assert len(list(validation_batches(shards, 999, 128, 1, 0, 1, EOD, "cpu"))) == 8
    with pytest.raises(DataError, match="1000 tokens reads 1001.* hold 1000"):
        validation_batches(shards, 1000, 128, 1, 0, 1, EOD, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_the_tokens_that_a_cpu_gets(counting: Counting) -> None:
    shards = counting([700, 1, 2500])
    on_gpu, on_cpu = (TokenStream(shards, 128, 4, 1, 2, device) for device in ("cuda", "cpu"))
    for step in range(10):
        for got, expected in zip(on_gpu.batch(step), on_cpu.batch(step), strict=True):
            assert got.device.type == "cuda"
            assert torch.equal(got.cpu(), expected)
