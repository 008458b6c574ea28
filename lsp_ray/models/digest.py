"""weights_digest: tells whether two folders hold the same weights, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

_NUM_SAMPLES = 256
_SAMPLE_BYTES = 4096


def weights_digest(folder: Path) -> str:
    """Return a hash of sizes, heads and evenly spaced samples of a folder's .safetensors files.

    Training changes weights everywhere, so samples differ. Weights split into files otherwise count as others.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            for sample in range(_NUM_SAMPLES):
                file.seek(size * sample // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
