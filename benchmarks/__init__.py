"""Programs that measure: how fast the parts and the whole are, on this machine, in this process. See README.md."""

import os
from pathlib import Path

# The trainer's own cache: what it has compiled is not compiled again. Set before torch reads it.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".cache" / "inductor"))
