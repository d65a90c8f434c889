"""Tokenise FineWeb, or any other text dataset, into shards from scratch.

    python data/fineweb.py --dataset HuggingFaceFW/fineweb --config sample-10BT --out data/fineweb
    python data/fineweb.py --dataset texts.jsonl --tokenizer data/local/tokenizer.json --out data/mine

Hugging Face datasets and .parquet files are read through the `datasets` package; .jsonl and .txt need nothing.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python data/fineweb.py` puts only data/ on the path

END_OF_DOCUMENT = "<|endoftext|>"
DOCUMENTS_AT_ONCE = 16

encode: Callable[[str], np.ndarray]  # set once in each worker process


class InputError(ValueError):
    """What is wrong with what was asked for, in one line."""


def load_encoder(tokenizer: Path | None) -> Callable[[str], np.ndarray]:
    """text → uint16 [tokens], the end-of-document token first. Special tokens inside the text are read as text.

    Without a tokenizer file it is GPT-2's, whose vocabulary tiktoken downloads once.
    """
    if tokenizer is None:
        try:
            import tiktoken

            gpt2 = tiktoken.get_encoding("gpt2")
        except ImportError as error:
            raise InputError("GPT-2's vocabulary needs tiktoken; pip install tiktoken, or use --tokenizer") from error
        except Exception as error:  # tiktoken passes on whatever its HTTP client raises
            raise InputError(
                f"tiktoken could not download GPT-2's vocabulary ({type(error).__name__}); "
                "connect this machine, or name a tokenizer file with --tokenizer"
            ) from error
        return lambda text: np.array([gpt2.eot_token, *gpt2.encode_ordinary(text)], dtype=np.uint16)

    from tokenizers import Tokenizer

    if not tokenizer.is_file():
        raise InputError(f"{tokenizer}: no such tokenizer file")
    local = Tokenizer.from_file(str(tokenizer))
    end = local.token_to_id(END_OF_DOCUMENT)
    if end is None or local.get_vocab_size() > 65_536:
        raise InputError(f"{tokenizer}: needs the token {END_OF_DOCUMENT} and at most 65,536 tokens to fit uint16")
    local.encode_special_tokens = True
    return lambda text: np.array([end, *local.encode(text, add_special_tokens=False).ids], dtype=np.uint16)


def start_worker(tokenizer: Path | None) -> None:
    global encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is already all the parallelism there is
    encode = load_encoder(tokenizer)


def encode_document(text: str) -> np.ndarray:
    return encode(text)


def read_documents(dataset: str, config: str | None) -> Iterator[str]:
    """The texts of a dataset's train split, in its order: .jsonl (field "text"), .txt (one document a line), .parquet
    (column "text"), or the name of a Hugging Face dataset."""
    suffix = Path(dataset).suffix
    if suffix in {".jsonl", ".txt"}:
        with open(dataset, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if suffix == ".txt":
                    yield line.rstrip("\n")
                    continue
                try:
                    yield json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f'{dataset}: line {number} is no JSON object with a "text"') from error
        return
    from datasets import load_dataset

    rows: Iterable[Any]
    try:
        if suffix == ".parquet":
            rows = load_dataset("parquet", data_files=dataset, split="train", streaming=True)
        else:
            rows = load_dataset(dataset, config, split="train", streaming=True)
    except Exception as error:  # no network, no such dataset, no such configuration: each a different library's error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{dataset}: could not be opened ({reason}); check its name and the network") from error
    for row in rows:
        if "text" not in row:
            raise InputError(f'{dataset}: has no "text" among {", ".join(row)}; choose a dataset of texts')
        yield row["text"]


def check(arguments: argparse.Namespace) -> None:
    dataset: str = arguments.dataset
    if min(arguments.shard_tokens, arguments.processes, arguments.val_shards) < 1:
        raise InputError("--shard-tokens, --processes and --val-shards are at least 1")
    if Path(dataset).suffix in {".jsonl", ".txt", ".parquet"} and not Path(dataset).is_file():
        raise InputError(f"{dataset}: no such file")
    if Path(dataset).suffix not in {".jsonl", ".txt"}:
        try:
            import datasets  # noqa: F401
        except ImportError as error:
            raise InputError(f"reading {dataset} needs the datasets package; pip install datasets") from error
    if list(arguments.out.glob("*.bin")):
        raise InputError(f"{arguments.out}: holds shards already; remove them or choose another --out")


def cut_into_shards(documents: Iterable[np.ndarray], shard_tokens: int) -> Iterator[np.ndarray]:
    """Join the documents and cut what comes out every `shard_tokens` tokens; the last shard may be shorter."""
    shard = np.empty(shard_tokens, dtype=np.uint16)
    filled = 0
    for document in documents:
        while len(document):
            piece = document[: shard_tokens - filled]
            shard[filled : filled + len(piece)] = piece
            filled += len(piece)
            document = document[len(piece) :]
            if filled == shard_tokens:
                yield shard
                filled = 0
    if filled:
        yield shard[:filled]


def make_shards(arguments: argparse.Namespace) -> None:
    check(arguments)
    load_encoder(arguments.tokenizer)  # fails here, once: a worker that cannot start is started again without end
    # Imported here and not above: worker processes import this file too, and have no use for torch.
    from switch_bank.data import write_shard

    arguments.out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    # Not forked: the datasets package runs threads, and a forked child may inherit their locks.
    context = multiprocessing.get_context("spawn")
    try:
        with context.Pool(arguments.processes, start_worker, (arguments.tokenizer,)) as pool:
            texts = read_documents(arguments.dataset, arguments.config)
            documents = pool.imap(encode_document, texts, chunksize=DOCUMENTS_AT_ONCE)
            for number, shard in enumerate(cut_into_shards(documents, arguments.shard_tokens)):
                part = "val" if number < arguments.val_shards else "train"
                path = arguments.out / f"{Path(arguments.dataset).stem}_{part}_{number:06d}.bin"
                write_shard(path, shard)
                written.append(path)
                print(f"{path}: {len(shard)} tokens", flush=True)
        if len(written) <= arguments.val_shards:
            raise InputError(
                f"{arguments.dataset} fills {len(written)} shards of {arguments.shard_tokens} tokens, and the first "
                f"{arguments.val_shards} are for validation; choose smaller --shard-tokens"
            )
    except BaseException:
        for path in written:  # or the next run would train on the beginning of the dataset as if it were all of it
            path.unlink()
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description="Tokenise a text dataset into shards.")
    parser.add_argument("--dataset", required=True, help="Hugging Face dataset, or a .jsonl, .parquet or .txt file")
    parser.add_argument("--config", help="configuration of the Hugging Face dataset, such as sample-10BT")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: GPT-2's, which tiktoken downloads)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens in each shard")
    parser.add_argument("--val-shards", type=int, default=1, help="how many of the first shards are for validation")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes that tokenise")
    arguments = parser.parse_args()
    try:
        make_shards(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
