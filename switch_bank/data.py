"""Token shards on disk, and the stream that training and validation read from them.

A step's tokens depend on nothing but the files and the step, so a run reads the same text on any number of processes
and picks up after a kill by asking for its next step.
"""

import glob
import hashlib
import os
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

MAGIC = 20240520
VERSION = 1
HEADER = np.dtype(("<i4", 256))
TOKEN = np.dtype("<u2")
SLICE_MULTIPLE = 128  # attention blocks, router position bins and EMA blocks are all cut at 128 tokens
IGNORED_TARGET = -100  # torch.nn.functional.cross_entropy leaves these targets out
SCAN_TOKENS = 2 << 20  # 4 MiB


class DataError(ValueError):
    """Data that cannot be trained on. One line: what is wrong, in which file, what to do."""


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write `tokens` (1-D, integers below 65,536) as one shard: 256 little-endian int32 of header (magic, version,
    token count, zeros), then uint16 tokens. The file appears whole or not at all.

    Raises DataError for an empty array or a token that does not fit uint16.
    """
    path = Path(path)
    if tokens.ndim != 1 or len(tokens) == 0:
        raise DataError(f"{path}: a shard is a non-empty row of tokens, not an array of shape {tokens.shape}")
    if tokens.min() < 0 or tokens.max() > np.iinfo(TOKEN).max:
        worst = tokens.min() if tokens.min() < 0 else tokens.max()
        raise DataError(f"{path}: token {worst} does not fit uint16; use a vocabulary of at most 65,536 tokens")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype(TOKEN).tobytes())
    os.replace(part, path)


@contextmanager
def _opened(path: str | Path) -> Iterator[BufferedReader]:
    """The file at `path`, to be read; an error of the system while it is open becomes a DataError."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise FileNotFoundError
        with open(path, "rb") as file:  # may be gone by now
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path} is no file; leave it out of the pattern, or fetch or make the file again") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; mend that, or leave it out of the pattern"
        ) from error


def _state(file: BufferedReader) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds: a change of the file shows here."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _require_unchanged(file: BufferedReader, state: tuple[int, int]) -> None:
    """Raises DataError unless the file's `_state` is what it was when the run met it."""
    if _state(file) != state:
        raise DataError(
            f"{file.name} has changed since the run read it first: put the old file back and go on with --run.resume, "
            "or start a new run"
        )


def _read_tokens(file: BufferedReader, out: np.ndarray, state: tuple[int, int]) -> None:
    """Fills `out` (uint16) with the next tokens of a file whose `_state` was `state` when the run met it."""
    size = file.readinto(out.data)
    _require_unchanged(file, state)  # after the read: a change during it counts too
    if size < out.nbytes:
        raise DataError(f"{file.name} was cut short while it was read; fetch or make the file again")


def read_header(path: str | Path) -> int:
    """Number of tokens in the shard at `path`, after checking that it is one and that it is all there.

    Raises DataError for a file that cannot be read, a wrong magic number or version, and for a file length that
    disagrees with the header.
    """
    with _opened(path) as file:
        raw = file.read(HEADER.itemsize)
        size, _ = _state(file)
    if len(raw) < HEADER.itemsize:
        raise DataError(f"{path}: {size} bytes is shorter than a shard's header; fetch or make the file again")
    magic, version, count = (int(number) for number in np.frombuffer(raw, dtype="<i4", count=3))
    if magic != MAGIC:
        raise DataError(f"{path}: magic number {magic}, not {MAGIC}: no token shard; leave it out of the pattern")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}, only {VERSION} can be read; make the file again")
    expected = HEADER.itemsize + count * TOKEN.itemsize
    if count < 1 or size != expected:
        raise DataError(
            f"{path}: the header says {count} tokens ({expected} bytes) but the file has {size} bytes; "
            "fetch or make the file again"
        )
    return count


def _scan(path: str, count: int, vocab_size: int) -> tuple[str, tuple[int, int]]:
    """sha256 of the whole file of `count` tokens in hex, and its `_state` before it was read; raises DataError at the
    first token that the vocabulary does not have."""
    digest = hashlib.sha256()
    buffer = np.empty(min(count, SCAN_TOKENS), dtype=TOKEN)
    with _opened(path) as file:
        state = _state(file)
        digest.update(file.read(HEADER.itemsize))
        for position in range(0, count, SCAN_TOKENS):
            tokens = buffer[: count - position]
            _read_tokens(file, tokens, state)
            digest.update(tokens.data)
            if tokens.max() >= vocab_size:
                offset = int(np.argmax(tokens >= vocab_size))
                raise DataError(
                    f"{path}: token {tokens[offset]} at position {position + offset} is outside the vocabulary of "
                    f"{vocab_size} tokens; train with the vocabulary that made the file, or make the file again"
                )
    return digest.hexdigest(), state


@dataclass(frozen=True)
class Shards:
    """The files of one split, in name order, read as one row of tokens.

    They are read by file, not mapped into memory: a mapped file that is cut short kills the process that reads it.
    """

    paths: list[str]
    lengths: list[int]  # tokens in each file
    sha256: list[str]  # of each whole file, header included, in hex
    states: list[tuple[int, int]]  # of each file when it was checked: bytes, and nanoseconds of the last change
    starts: list[int]  # stream position of each file's first token
    total: int  # tokens in all files

    @classmethod
    def open(cls, pattern: str, vocab_size: int) -> "Shards":
        """Check and open the files that match the glob `pattern`. Every file is read whole once, several at a time.

        Raises DataError when nothing matches, when a file is no shard, cannot be read or is cut short, when a token is
        `vocab_size` or more, and for names that no line of the log can hold.
        """
        _check_name(pattern)
        paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise DataError(
                f"no file matches {pattern}; make shards with data/local_text.py, "
                "or fetch FineWeb with data/cached_fineweb10B.py"
            )
        for path in paths:
            _check_name(path)
        lengths = [read_header(path) for path in paths]
        with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1)) as pool:
            scans = list(pool.map(_scan, paths, lengths, [vocab_size] * len(paths)))
        sha256, states = (list(parts) for parts in zip(*scans, strict=True))
        starts = [0, *accumulate(lengths)]
        return cls(paths, lengths, sha256, states, starts[:-1], starts[-1])

    def summary(self) -> list[tuple[str, int, str]]:
        """Path, tokens and sha256 of each file."""
        return list(zip(self.paths, self.lengths, self.sha256, strict=True))

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start .. start + count - 1` of the endless stream (uint16 [count]): after the last file comes the
        first again, and `start` may lie any number of rounds ahead.

        Raises DataError when a file can no longer be read, or has changed since it was checked.
        """
        start %= self.total
        index = bisect_right(self.starts, start) - 1
        offset = start - self.starts[index]
        out = np.empty(count, dtype=TOKEN)
        filled = 0
        while filled < count:
            part = out[filled : filled + self.lengths[index] - offset]
            with _opened(self.paths[index]) as file:
                _require_unchanged(file, self.states[index])  # before what may fail in another file's place
                file.seek(HEADER.itemsize + offset * TOKEN.itemsize)
                _read_tokens(file, part, self.states[index])
            filled += len(part)
            index, offset = (index + 1) % len(self.paths), 0
        return out


def _check_name(path: str) -> None:
    """Raises DataError for control characters, line ends among them, and for bytes that are no text in UTF-8."""
    if {unicodedata.category(character) for character in path} & {"Cc", "Cs", "Zl", "Zp"}:
        raise DataError(f"{path!r} has characters that a line of text cannot hold; rename the file or its folder")


def _check_slice(slice_tokens: int) -> None:
    if slice_tokens < 1 or slice_tokens % SLICE_MULTIPLE:
        raise DataError(f"a slice of {slice_tokens} tokens is not a multiple of {SLICE_MULTIPLE}; choose one that is")


class TokenStream:
    """Training batches: step n reads `slices_per_step * slice_tokens` tokens in a row from stream position
    `n * slices_per_step * slice_tokens`. Each `microbatch_slices` slices in a row are a microbatch, and
    microbatch i of the step belongs to process i mod `world_size`, so that it is the same slices on any number of
    processes. `own_slices` are the indices in the step of this process's slices, int64 on the device.

    `batch(step)` is a pure function of the step. While the caller works on a step, a background thread reads the next
    one (into pinned memory for a CUDA device). `steps_in_one_epoch` is the number of steps, targets included, before
    the stream starts over.

    Raises DataError when a slice is no multiple of 128 tokens or the processes cannot share a step evenly.
    """

    def __init__(
        self,
        shards: Shards,
        slice_tokens: int,
        slices_per_step: int,
        rank: int,
        world_size: int,
        device: torch.device | str,
        microbatch_slices: int = 1,
    ) -> None:
        _check_slice(slice_tokens)
        if slices_per_step < 1 or slices_per_step % (world_size * microbatch_slices):
            raise DataError(
                f"{world_size} processes cannot share {slices_per_step} slices a step evenly, {microbatch_slices} a "
                "microbatch; choose a number of slices that the number of processes divides"
            )
        self.shards = shards
        self.slice_tokens = slice_tokens
        self.slices_per_step = slices_per_step
        self.rank = rank
        self.world_size = world_size
        self.microbatch_slices = microbatch_slices
        self.device = torch.device(device)
        self.step_tokens = slices_per_step * slice_tokens
        self.steps_in_one_epoch = (shards.total - 1) // self.step_tokens
        self._pinned = self.device.type == "cuda"
        if self._pinned and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        microbatches = torch.arange(slices_per_step, device=self.device).view(-1, microbatch_slices)
        self.own_slices = microbatches[rank::world_size].flatten()
        self._reader = ThreadPoolExecutor(1, "token-stream", self._enter_thread)
        self._ahead: tuple[int, Future[torch.Tensor]] | None = None

    def _enter_thread(self) -> None:
        if self._pinned:  # a new thread is on GPU 0, and pinning memory there would open a context on it
            torch.cuda.set_device(self.device)

    def _read(self, step: int) -> torch.Tensor:
        """int64 [2, slices of this process, slice_tokens]: inputs and targets, in host memory."""
        # One read of the whole step: opening the file costs more than the slices of the other processes.
        read = self.shards.read(step * self.step_tokens, self.step_tokens + 1).astype(np.int64)
        shape = (-1, self.microbatch_slices, self.slice_tokens)
        mine = slice(self.rank, None, self.world_size)
        own = self.slices_per_step // self.world_size
        pair = torch.empty(2, own, self.slice_tokens, dtype=torch.int64, pin_memory=self._pinned)
        for half, tokens in zip(pair, (read[:-1], read[1:]), strict=True):
            half.view(shape).copy_(torch.from_numpy(tokens.reshape(shape)[mine]))
        return pair

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of this process in `step`, both int64 [slices of this process, slice_tokens] on the
        device, and start reading step + 1. What went wrong while reading is raised here, for the step asked for."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._reader.submit(self._read, step)
        pair = self._ahead[1].result()
        self._ahead = step + 1, self._reader.submit(self._read, step + 1)
        # The copy runs on the caller's CUDA stream: whatever the caller does next with it is in order.
        inputs, targets = pair.to(self.device, non_blocking=True)
        return inputs, targets

    def check_length(self, steps: int) -> None:
        """Raises DataError if `steps` steps read more than one epoch."""
        if steps > self.steps_in_one_epoch:
            raise DataError(
                f"the training data lasts for {self.steps_in_one_epoch} steps and the run takes {steps}; "
                "add shards, or allow a second epoch with --data.repeat"
            )

    def epoch(self, step: int) -> int:
        """How many times the stream has started over before the first token of `step`."""
        return step * self.step_tokens // self.shards.total


def validation_batches(
    shards: Shards,
    val_tokens: int,
    slice_tokens: int,
    slices_per_batch: int,
    rank: int,
    world_size: int,
    eod_token: int,
    device: torch.device | str,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The first `val_tokens` tokens of the shards, each the input of exactly one prediction over all processes.

    They are cut in order into slices; slice i goes to process i mod `world_size`. Every process gets the same number
    of batches of inputs and targets, both int64 [slices_per_batch, slice_tokens] on the device. What fills up a short
    last slice, or a batch, is one document a slice, with `IGNORED_TARGET` as targets.

    Raises DataError when a slice is no multiple of 128 tokens, or the shards hold fewer than `val_tokens` + 1 tokens.
    """
    _check_slice(slice_tokens)
    if val_tokens < 1 or shards.total < val_tokens + 1:
        raise DataError(
            f"validating {val_tokens} tokens reads {val_tokens + 1}, but {shards.paths[0]} and the "
            f"{len(shards.paths) - 1} files after it hold {shards.total}; ask for 1 to {shards.total - 1} tokens"
        )
    slices = -(-val_tokens // slice_tokens)
    batches = -(-slices // (slices_per_batch * world_size))

    def read_batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in range(batches):
            # Not all `eod_token`: flash-attn takes no documents of a token each.
            inputs = np.full((slices_per_batch, slice_tokens), int(eod_token == 0), dtype=np.int64)
            targets = np.full((slices_per_batch, slice_tokens), IGNORED_TARGET, dtype=np.int64)
            for row in range(slices_per_batch):
                start = ((batch * slices_per_batch + row) * world_size + rank) * slice_tokens
                count = min(slice_tokens, val_tokens - start)
                if count > 0:
                    tokens = shards.read(start, count + 1)
                    inputs[row, :count] = tokens[:-1]
                    targets[row, :count] = tokens[1:]
                    inputs[row, count : count + 1] = eod_token
            yield torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)

    return read_batches()
