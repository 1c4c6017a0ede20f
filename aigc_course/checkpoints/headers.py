"""What the header of a safetensors file may be, beyond what the library itself looks at."""

import io
import json
from typing import Any

MAX_HEADER = 10**6  # bytes of a safetensors file that name its tensors: fifteen times those of the largest GPT-2


def check_header(file: io.BufferedIOBase) -> None:
    """Raise ``ValueError`` for a header that safetensors would read: one of over 1 MB, or one that names a thing twice.

    ``file`` stands at its beginning. Whatever else may be wrong with it, safetensors finds.
    """
    size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise ValueError(f"a header of {size:,} bytes")
    json.loads(file.read(size), object_pairs_hook=_each_once)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)!r} twice")
    return dict(pairs)
