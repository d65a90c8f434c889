"""Make token shards from text that is on every machine: no network, no download, under a minute.

    python data/local_text.py [PATH ...]     (no PATH: the Python standard library's own sources)

Trains a byte-level BPE on the text and writes train_000000.bin, val_000000.bin and tokenizer.json.
"""

import argparse
import hashlib
import os
import random
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python data/local_text.py` puts only data/ on the path

from switch_bank.data import DataError, write_shard  # noqa: E402

END_OF_DOCUMENT = "<|endoftext|>"
SUFFIXES = {".py", ".txt", ".md", ".rst", ".tex", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs", ".sh"}
BPE_TRAINING_BYTES = 8_000_000  # merges change little beyond this, and it keeps the whole run under a minute
FEWEST_TOKENS = 129  # one slice of 128 inputs and the last one's target
ENCODE_AT_ONCE = 2_000
BOUNDARIES = [
    re.compile(r"(?<=\n\n)(?=(?:@|def |async def |class )\S)"),  # a blank line before a top-level definition
    re.compile(r"(?<=\n\n)(?=[^\n])"),  # any blank line
    re.compile(r"(?<=\n)"),  # a line's end
]
OUTPUTS = {"train_000000.bin", "val_000000.bin", "tokenizer.json"}


def find_files(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """(path relative to the PATH it was found under, file), in order. A file that is named is read whatever its
    suffix; in folders, hidden ones and installed packages are left out."""
    if not paths:
        library = Path(sysconfig.get_path("stdlib"))
        return [(name, file) for name, file in find_files([library]) if file.suffix == ".py"]
    found = []
    for root in paths:
        if root.is_file():
            found.append((root.name, root))
        elif not root.is_dir():
            raise DataError(f"{root}: no such file or folder")
        for folder, inner, names in os.walk(root):
            inner[:] = sorted(n for n in inner if n not in {"site-packages", "dist-packages"} and n[0] != ".")
            files = [Path(folder, name) for name in sorted(names) if Path(name).suffix in SUFFIXES]
            found += [(file.relative_to(root).as_posix(), file) for file in files]
    return found


def read_texts(files: Sequence[tuple[str, Path]]) -> list[str]:
    """Texts without duplicates, ordered by a hash of the relative path: mixed, and the same on every machine."""
    texts: dict[str, str] = {}
    for name, file in files:
        try:
            text = file.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:  # not text in the one encoding we read; the summary counts it
            continue
        if text.strip() and text not in texts:
            texts[text] = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return sorted(texts, key=texts.__getitem__)


def split(texts: Sequence[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Training and validation texts: as many whole files as fit into `val_fraction` of all characters, at least one."""
    if len(texts) < 2:
        raise DataError(f"too little text: {len(texts)} different files, and validation needs its own; name more files")
    room = val_fraction * sum(map(len, texts))
    train, val = [], []
    for text in texts:
        if len(text) <= room:
            val.append(text)
            room -= len(text)
        else:
            train.append(text)
    if not val:
        val.append(min(train, key=len))
        train.remove(val[0])
    return train, val


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; id 0 ends a document and begins the next."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sample, size = [], 0
    for text in texts:
        if size >= BPE_TRAINING_BYTES:
            break
        sample.append(text[: BPE_TRAINING_BYTES - size])
        size += len(sample[-1].encode())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text, not the end of a document
    return tokenizer


def cut(text: str, length: int, limit: int, lengths_of: Callable[[list[str]], list[int]], level: int = 0) -> list[str]:
    """Cut a text of `length` tokens into documents of about `limit` at most, at the best boundaries that are close
    enough together (BOUNDARIES, best first), and anywhere in a line that is longer than the limit."""
    if length <= limit:
        return [text]
    if level < len(BOUNDARIES):
        pieces = [piece for piece in BOUNDARIES[level].split(text) if piece]
    else:
        size = max(1, limit // 4)  # a character is at most 4 bytes, so at most 4 tokens
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
    documents: list[str] = []
    room = 0
    for piece, piece_length in zip(pieces, lengths_of(pieces), strict=True):
        if piece_length <= room:
            documents[-1] += piece
            room -= piece_length
        elif piece_length <= limit or level == len(BOUNDARIES):
            documents.append(piece)
            room = limit - piece_length
        else:
            documents += cut(piece, piece_length, limit, lengths_of, level + 1)
            room = 0
    return documents


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


def to_tokens(tokenizer: Tokenizer, texts: Sequence[str], limit: int, seed: int) -> tuple[np.ndarray, int]:
    """The texts cut into documents, each after an end-of-document token, in shuffled order: uint16 [tokens], and the
    number of documents."""

    def lengths_of(pieces: list[str]) -> list[int]:
        return [len(ids) for ids in encode(tokenizer, pieces)]

    documents: list[np.ndarray] = []
    for start in range(0, len(texts), ENCODE_AT_ONCE):
        some = list(texts[start : start + ENCODE_AT_ONCE])
        cuts = [cut(text, length, limit - 1, lengths_of) for text, length in zip(some, lengths_of(some), strict=True)]
        pieces = [piece for pieces in cuts for piece in pieces]
        documents += [np.array([0, *ids], dtype=np.uint16) for ids in encode(tokenizer, pieces)]
    random.Random(seed).shuffle(documents)
    tokens = np.concatenate(documents)
    if len(tokens) < FEWEST_TOKENS:
        raise DataError(f"too little text: {len(tokens)} tokens for training or validation; name more files or folders")
    return tokens, len(documents)


def replace_folder(new: Path, out: Path, scratch: Path) -> None:
    """Put `new` at `out`; what an earlier run left there goes to `scratch`."""
    if out.exists():
        out.rename(scratch / "old")
    new.rename(out)


def make_shards(arguments: argparse.Namespace) -> str:
    """Write the shards and the tokenizer, all or nothing, and say in one paragraph what they hold."""
    began = time.perf_counter()
    out: Path = arguments.out.resolve()
    if out.exists() and (not out.is_dir() or {entry.name for entry in out.iterdir()} - OUTPUTS):
        raise DataError(f"{out}: holds something that this program did not make; choose another --out")
    files = find_files(arguments.paths)
    texts = read_texts(files)
    train, val = split(texts, arguments.val_fraction)
    tokenizer = train_tokenizer(train, arguments.vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.part-", dir=out.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        vocabulary = tokenizer.get_vocab_size()
        lines = [f"{len(files)} files, {len(texts)} different UTF-8 texts among them, vocabulary {vocabulary}"]
        for name, part in ("train", train), ("val", val):
            tokens, documents = to_tokens(tokenizer, part, arguments.max_document_tokens, arguments.seed)
            write_shard(new / f"{name}_000000.bin", tokens)
            size = sum(len(text.encode()) for text in part)
            lines.append(
                f"{name}: {len(part)} files, {documents} documents, {len(tokens)} tokens, "
                f"{size / len(tokens):.2f} bytes per token"
            )
        tokenizer.save(str(new / "tokenizer.json"))
        replace_folder(new, out, Path(scratch))
    return "\n".join([*lines, f"{out}: written in {time.perf_counter() - began:.0f} seconds"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Make token shards from local text.")
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="file or folder (default: Python's own)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens, 257 to 65,536")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "local", help="folder to write")
    parser.add_argument("--max-document-tokens", type=int, default=1000, help="longer files are cut into documents")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="share of the text, in whole files")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the documents")
    arguments = parser.parse_args()
    if not 257 <= arguments.vocab_size <= 65_536:
        parser.error(f"--vocab-size {arguments.vocab_size}: 257 (every byte and the end of a document) to 65536")
    if arguments.max_document_tokens < 8:
        parser.error(f"--max-document-tokens {arguments.max_document_tokens}: at least 8")
    if not 0 < arguments.val_fraction < 1:
        parser.error(f"--val-fraction {arguments.val_fraction}: a share between 0 and 1")
    try:
        print(make_shards(arguments))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
