"""Fetch FineWeb, already tokenised with GPT-2's vocabulary, as the speedruns use it.

python data/cached_fineweb10B.py [N]     (the validation shard and N training shards of 100M tokens, default 103)
"""

import argparse
import sys
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python data/cached_fineweb10B.py` puts only data/ on the path

from switch_bank.data import DataError, read_header  # noqa: E402

REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAIN_SHARDS = 103
CONNECT_SECONDS = 10.0


def is_whole(path: Path) -> bool:
    """Is the shard here, and as long as its header says? A file that is not is deleted, and that is said."""
    if not path.exists():
        return False
    try:
        read_header(path)
    except DataError as error:
        path.unlink()  # hf_hub_download would take a file of this name for the right one and leave it as it is
        print(f"deleted: {error}", file=sys.stderr)
        return False
    return True


def fetch(name: str, folder: Path) -> str | None:
    """Download one shard into `folder`. A dropped connection is resumed where it broke. Returns what went wrong."""
    try:
        # Asked first because hf_hub_download itself repeats a failed request for minutes before it gives up.
        get_hf_file_metadata(hf_hub_url(REPOSITORY, name, repo_type="dataset"), timeout=CONNECT_SECONDS)
        hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=folder)
    except Exception as error:  # huggingface_hub passes on its HTTP client's own errors, and has changed clients twice
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return None if is_whole(folder / name) else "what arrived is not a whole shard"


def main() -> int:
    parser = argparse.ArgumentParser(description=f"Download the shards of {REPOSITORY}.")
    parser.add_argument("shards", nargs="?", type=int, default=TRAIN_SHARDS, metavar="N", help="training shards (103)")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "fineweb10B", help="folder for the shards")
    arguments = parser.parse_args()
    if not 0 <= arguments.shards <= TRAIN_SHARDS:
        parser.error(f"N is {arguments.shards}; there are {TRAIN_SHARDS} training shards")
    names = ["fineweb_val_000000.bin"]
    names += [f"fineweb_train_{number:06d}.bin" for number in range(1, arguments.shards + 1)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for done, name in enumerate(names, start=1):
        here = is_whole(arguments.out / name)
        problem = None if here else fetch(name, arguments.out)
        if problem:
            print(
                f"error: {name} could not be fetched ({problem}); run this again, or copy it from the Hugging Face "
                f"dataset {REPOSITORY} into {arguments.out}, or make other shards with data/local_text.py",
                file=sys.stderr,
            )
            return 2
        print(f"{done}/{len(names)} {name} {'is here' if here else 'fetched'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
