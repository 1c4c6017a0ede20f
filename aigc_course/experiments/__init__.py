"""Side experiments, too long to run in a lesson: each is recorded in ``data/histories`` by ``aigc experiment NAME``."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from .. import recipes
from ..checkpoints import write_atomically
from ..runtime import CourseError, course_dir, pick_device
from .adversarial import dcgan_ablations, dcgan_growth, dcgan_sick, digit_scale, gan_grid, unpack_images
from .language import language_memory
from .variational import AutoregressiveVAE, Row, collapse_step, vae_beta, vae_collapse, vae_table

__all__ = [
    "EXPERIMENTS",
    "AutoregressiveVAE",
    "collapse_step",
    "dcgan_ablations",
    "dcgan_growth",
    "dcgan_sick",
    "digit_scale",
    "gan_grid",
    "language_memory",
    "record",
    "recorded",
    "run",
    "unpack_images",
    "vae_beta",
    "vae_collapse",
    "vae_table",
]


def recorded(name: str, *, live: bool = False) -> dict[str, Any]:
    """What the experiment ``name`` found: as recorded in ``data/histories``, or run here and now if ``live``.

    The result has its ``rows``, and says by which ``command``, on which ``machine`` and in how many ``seconds`` it was
    made; one line of this is printed. Raises ``CourseError`` for a name that is none and for a damaged recording.
    """
    if live:
        found = run(name)
    else:
        path = course_dir() / "data" / "histories" / f"{_known(name)}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows, command, machine, seconds = (found[key] for key in ("rows", "command", "machine", "seconds"))
            told = f"recorded by: {command} ({len(rows)} rows; {machine}; {seconds / 60:.0f} minutes)"
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CourseError(
                f"{path} cannot be read ({type(error).__name__}: {error}): git checkout -- data/histories, or record "
                f"it anew by: aigc experiment {name}"
            ) from error
        print(f"{told}. LIVE = True runs it.")
    return found


def run(name: str, device: str = "auto") -> dict[str, Any]:
    """Run the experiment ``name`` and return what ``recorded`` reads; its rows are printed as they come."""
    rows, start, place = [], time.perf_counter(), pick_device(device)
    for row in EXPERIMENTS[_known(name)](place):
        rows.append(row)
        shown = {
            key: value[-1] if isinstance(value, list) else value
            for key, value in row.items()
            if not isinstance(value, dict)
        }
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()), flush=True)
    seconds = time.perf_counter() - start
    return {
        "command": f"aigc experiment {name}",
        "machine": recipes.machine(place),
        "seconds": round(seconds, 1),
        "rows": rows,
    }


def record(name: str, device: str = "auto") -> str:
    """Run the experiment ``name`` and keep it in ``data/histories``; returns the file's path."""
    found = run(name, device)
    path = course_dir() / "data" / "histories" / f"{name}.json"
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode("utf-8"))
    return str(path)


def _known(name: str) -> str:
    if name not in EXPERIMENTS:
        raise CourseError(f"there is no experiment {name!r}: choose from {', '.join(EXPERIMENTS)}")
    return name


EXPERIMENTS: dict[str, Callable[..., Iterator[Row]]] = {
    "vae_table": vae_table,
    "vae_beta": vae_beta,
    "vae_collapse": vae_collapse,
    "gan_grid": gan_grid,
    "digit_scale": digit_scale,
    "dcgan_growth": dcgan_growth,
    "dcgan_ablations": dcgan_ablations,
    "dcgan_sick": dcgan_sick,
    "language_memory": language_memory,
}
