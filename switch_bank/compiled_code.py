"""What torch's compiler left on disk."""

import time
from contextlib import suppress
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import cache_dir

LINKED_WITHIN_S = 3  # a library that is being linked is younger


def remove_half_written() -> None:
    """Removes libraries that a killed linker left in Inductor's cache. It links them in place and takes one that is
    there for whole, so that every later process would fail with "file too short". GNU's linker writes the header last:
    before, a file is empty or begins with zeros."""
    latest = time.time() - LINKED_WITHIN_S
    for library in Path(cache_dir()).glob("*/*.so"):
        with suppress(FileNotFoundError), open(library, "rb") as file:  # processes that start together all remove them
            if not file.read(4).strip(b"\0") and library.stat().st_mtime < latest:
                library.unlink()
