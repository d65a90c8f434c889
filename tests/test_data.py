"""Shards are checked before they are trusted, and every process count reads the same stream."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_bank.data import (
    IGNORED_TARGET,
    DataError,
    Shards,
    TokenStream,
    read_header,
    validation_batches,
    write_shard,
)

VOCABULARY = 50_257
EOD = 7


def in_memory(lengths: list[int]) -> Shards:
    """Shards without files whose tokens are their own stream positions."""
    starts = [0, *np.cumsum(lengths).tolist()]
    tokens = [np.arange(a, b, dtype=np.uint16) for a, b in zip(starts, starts[1:], strict=False)]
    paths = [f"{n}.bin" for n in range(len(lengths))]
    return Shards(paths, lengths, [""] * len(lengths), tokens, starts[:-1], starts[-1])


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
def test_reading_crosses_files_and_starts_over_at_the_end(lengths: list[int], start: int, count: int) -> None:
    shards = in_memory(lengths)
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
@given(data=st.data(), processes=st.integers(1, 6), rounds=st.integers(1, 3), blocks=st.integers(1, 3))
def test_a_step_reads_the_same_tokens_on_any_number_of_processes(
    data: st.DataObject, processes: int, rounds: int, blocks: int
) -> None:
    slices, slice_tokens = processes * rounds, 128 * blocks
    shards = in_memory(data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=4)))
    step = data.draw(st.integers(0, 20))
    streams = [TokenStream(shards, slice_tokens, slices, rank, processes, "cpu") for rank in range(processes)]
    inputs = torch.empty(slices, slice_tokens, dtype=torch.int64)
    targets = torch.empty_like(inputs)
    for rank, stream in enumerate(streams):
        inputs[rank::processes], targets[rank::processes] = stream.batch(step)
    start = step * slices * slice_tokens
    expected = torch.arange(start, start + slices * slice_tokens + 1) % shards.total
    assert torch.equal(inputs.flatten(), expected[:-1])
    assert torch.equal(targets.flatten(), expected[1:])
    assert streams[0].epoch(step) == start // shards.total


def test_a_batch_depends_on_the_step_alone_whatever_was_read_before() -> None:
    shards = in_memory([700, 1, 2500])
    fresh = {step: TokenStream(shards, 128, 4, 1, 2, "cpu").batch(step) for step in range(20)}
    stream = TokenStream(shards, 128, 4, 1, 2, "cpu")
    for step in [0, 1, 2, 2, 9, 10, 0, 19, 1, 0, 1, 2, 3]:
        inputs, targets = stream.batch(step)
        assert inputs.shape == targets.shape == (2, 128)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs, fresh[step][0])
        assert torch.equal(targets, fresh[step][1])


def test_a_batch_stays_what_it_was_while_the_next_ones_are_read() -> None:
    stream = TokenStream(in_memory([5000]), 128, 2, 0, 1, "cpu")
    first = stream.batch(0)[0]
    copy = first.clone()
    for step in range(1, 5):
        stream.batch(step)
    assert torch.equal(first, copy)


@pytest.mark.parametrize(("total", "steps"), [(256, 0), (257, 1), (512, 1), (513, 2)])
def test_an_epoch_holds_the_steps_whose_last_target_is_still_in_it(total: int, steps: int) -> None:
    stream = TokenStream(in_memory([total]), 128, 2, 0, 1, "cpu")
    assert stream.steps_in_one_epoch == steps
    read = torch.cat([stream.batch(step)[1].flatten() for step in range(steps + 1)])
    assert int((read == 0).nonzero()[0]) == total - 1  # the stream's first token is a target again
    assert steps * 256 <= total - 1 < (steps + 1) * 256


class BrokenDisk(Shards):
    """Shards of which the second step cannot be read."""

    def read(self, start: int, count: int) -> np.ndarray:
        if 256 <= start < 512:
            raise OSError("the disk is gone")
        return super().read(start, count)


def test_an_error_while_reading_ahead_is_raised_for_the_step_it_belongs_to() -> None:
    good = in_memory([5000])
    shards = BrokenDisk(good.paths, good.lengths, good.sha256, good.tokens, good.starts, good.total)
    stream = TokenStream(shards, 128, 2, 0, 1, "cpu")
    stream.batch(0)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            stream.batch(1)
    assert stream.batch(2)[0][0, 0] == 512


@pytest.mark.parametrize("slice_tokens", [0, 100, 129, -128])
def test_a_slice_that_is_no_multiple_of_128_is_refused(slice_tokens: int) -> None:
    with pytest.raises(DataError, match=f"{slice_tokens} tokens is not a multiple of 128"):
        TokenStream(in_memory([5000]), slice_tokens, 2, 0, 1, "cpu")
    with pytest.raises(DataError, match=f"{slice_tokens} tokens is not a multiple of 128"):
        validation_batches(in_memory([5000]), 1000, slice_tokens, 1, 0, 1, EOD, "cpu")


@pytest.mark.parametrize(("slices", "processes"), [(8, 3), (2, 4), (0, 1)])
def test_processes_that_cannot_share_a_step_evenly_are_refused(slices: int, processes: int) -> None:
    with pytest.raises(DataError, match=f"{processes} processes cannot share {slices} slices"):
        TokenStream(in_memory([5000]), 128, slices, 0, processes, "cpu")


@settings(deadline=None, max_examples=50)
@given(
    val_tokens=st.integers(1, 3000),
    spare=st.integers(1, 300),
    blocks=st.integers(1, 4),
    slices_per_batch=st.integers(1, 4),
    processes=st.integers(1, 5),
)
def test_validation_predicts_each_of_the_first_tokens_once(
    val_tokens: int, spare: int, blocks: int, slices_per_batch: int, processes: int
) -> None:
    shards = in_memory([val_tokens, spare])
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
    assert (inputs[val_tokens:] == EOD).all()
    assert (targets[val_tokens:] == IGNORED_TARGET).all()
    assert len(inputs) - val_tokens < slices_per_batch * processes * slice_tokens


def test_fewer_validation_tokens_than_asked_says_how_many_there_are() -> None:
    shards = in_memory([600, 400])
    assert len(list(validation_batches(shards, 999, 128, 1, 0, 1, EOD, "cpu"))) == 8
    with pytest.raises(DataError, match="1000 tokens reads 1001.* hold 1000"):
        validation_batches(shards, 1000, 128, 1, 0, 1, EOD, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_the_tokens_that_a_cpu_gets() -> None:
    shards = in_memory([700, 1, 2500])
    on_gpu, on_cpu = (TokenStream(shards, 128, 4, 1, 2, device) for device in ("cuda", "cpu"))
    for step in range(10):
        for got, expected in zip(on_gpu.batch(step), on_cpu.batch(step), strict=True):
            assert got.device.type == "cuda"
            assert torch.equal(got.cpu(), expected)
