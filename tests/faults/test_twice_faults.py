"""Every lesson with each of its cells run twice: the second time it says and draws what it did the first time."""

import difflib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from aigc_course import course

LESSONS = course.lessons()
WIDGET = "application/vnd.jupyter.widget-view+json"
MEASURED = r"(?<![\w.])\d[\d,]*(\.\d+)?(e[+-]\d+)?(?=( ?(s|ms|µs|min|seconds?|minutes?|MB|GB|MiB|GiB|tokens/s)\b))"
CLOCKS = {"cost-measure"}  # cells whose picture shows times
# What fit and train say of a run folder that the first time filled; an object's address; a progress line.
PASSING = r"^(.* holds this run, finished.*|going on from step .*|step \d+/\d+ · .*)$\n?"


def settled(text: str) -> str:
    """``text`` without times, sizes in memory, addresses, and what a run in progress says."""
    text = re.sub(PASSING, "", text, flags=re.MULTILINE)
    return re.sub(r"0x[0-9a-f]+", "0x…", re.sub(MEASURED, "…", text))


def shown(cell) -> list[str]:
    """What a cell's outputs show, in order: its settled text, and its pictures and other data as they are stored."""
    streams, data = {}, []
    for output in cell.outputs:
        if output.output_type == "stream":
            streams[output.name] = streams.get(output.name, "") + output.text
        elif WIDGET not in output.get("data", {}):
            for mime, content in sorted(output.get("data", {}).items()):
                seen = "a picture of times" if cell.id in CLOCKS and mime == "image/png" else settled(str(content))
                data.append(f"{mime}: {seen}")
    return [settled(text) for text in streams.values()] + [text for text in data if text != "text/plain: "]


def difference(first: list[str], second: list[str]) -> str:
    """What the second time shows otherwise than the first; nothing, if both are the same."""
    lines = [[line[:200] for text in texts for line in text.splitlines()] for texts in (first, second)]
    changed = [line for line in difflib.unified_diff(*lines, n=0, lineterm="") if not line.startswith(("---", "+++"))]
    return "" if first == second else " | ".join(changed[:12]) or "longer or shorter"


def run_each_cell_twice(path: Path, folder: Path, threads: str) -> list[str]:
    """Where the second run of a cell differs from the first; the lesson must still end with a record that it passed."""
    notebook, found = nbformat.read(path, as_version=4), []
    client = NotebookClient(notebook, kernel_name="python3", timeout=600, resources={"metadata": {"path": path.parent}})
    client.extra_arguments = ["--log-level=CRITICAL"]  # the kernel warns of its TCP ports at every start
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AIGC_")}
    environment |= {"AIGC_RUN_DIR": str(folder / "runs"), "AIGC_RECORD_DIR": str(folder / "records")}
    with client.setup_kernel(env=environment | {"AIGC_PROFILE": "quick", "OMP_NUM_THREADS": threads}):
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type != "code":
                continue
            try:
                client.execute_cell(cell, index)
            except CellExecutionError as error:
                return [*found, f"{cell.id}, run once: {error.ename}: {error.evalue}"]
            first = shown(cell)
            try:
                client.execute_cell(cell, index)
            except CellExecutionError as error:
                found.append(f"{cell.id}: {error.ename}: {error.evalue}")
            else:
                if changed := difference(first, shown(cell)):
                    found.append(f"{cell.id}: {changed}")
    record = json.loads((folder / "records" / f"{path.stem}.json").read_text(encoding="utf-8"))
    return [*found, *([] if record["passed"] else ["its record says that it failed"])]


@pytest.mark.fault("18")
def test_a_cell_run_twice_shows_the_same_again(fault, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        longest_first = LESSONS[: fault.n][::-1]
        runs = [
            (path, pool.submit(run_each_cell_twice, path, tmp_path / path.stem, "2" if fault.n == 1 else "1"))
            for path in longest_first
        ]
        for path, run in runs:
            with fault.case(path.stem):
                found = run.result()
                assert not found, "; ".join(found)
