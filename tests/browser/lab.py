"""A JupyterLab of its own, and hands and eyes for one notebook in it: run, wait, look, move, type."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Locator, Page, sync_playwright

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
IDLE = "Python 3 (ipykernel) | Idle"
# Every cell stands in the page, also those out of sight; nothing asks the reader anything or reaches for the network.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none", "codeCellConfig": {"autoClosingBrackets": False}},
    "apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false", "doNotDisturbMode": True},
}


def chromium() -> str | None:
    """The browser: what AIGC_CHROMIUM names, else the first that the system has."""
    named = os.environ.get("AIGC_CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, CHROMIUMS)), None)


class Lab:
    """JupyterLab on a free port with a token, settings, run folder and copies of notebooks of its own.

    The copies have no outputs: whatever is seen in them has come about here.
    """

    def __init__(self, folder: Path, notebooks: Path):
        self.folder, self.token = folder, secrets.token_hex(16)
        self.root = folder / "notebooks"
        shutil.copytree(notebooks, self.root, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        for path in self.root.glob("*.ipynb"):
            self.write(path.name, json.loads(path.read_text(encoding="utf-8")))
        for name, values in SETTINGS.items():
            path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values), encoding="utf-8")
        self.env = {**os.environ, "AIGC_RUN_DIR": str(folder / "runs"), "AIGC_RECORD_DIR": str(folder / "records")}
        self.env |= {"AIGC_PROFILE": "quick", "JUPYTER_PREFER_ENV_PATH": "1", "JUPYTERLAB_WORKSPACES_DIR": str(folder)}
        self.env |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "IPYTHONDIR": str(folder / "ipython")}
        for name in ("CONFIG", "DATA", "RUNTIME"):
            self.env[f"JUPYTER_{name}_DIR"] = str(folder / name.lower())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"

    def write(self, name: str, notebook: dict) -> None:
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
        (self.root / name).write_text(json.dumps(notebook), encoding="utf-8")

    def __enter__(self) -> "Lab":
        options = ["--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.url.rpartition(':')[2]}"]
        options += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}", "--allow-root"]
        options += [
            f"--ServerApp.root_dir={self.root}",
            "--LabApp.news_url=None",
            "--LabApp.extension_manager=readonly",
        ]
        options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
        self.log = (self.folder / "lab.log").open("w", encoding="utf-8")
        self.server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=self.env, stdout=self.log, stderr=self.log
        )
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/api?token={self.token}", timeout=5).close()
                return self
            except (urllib.error.URLError, OSError):
                if self.server.poll() is not None or time.monotonic() > end:
                    self.__exit__()
                    told = (self.folder / "lab.log").read_text(encoding="utf-8")[-2000:]
                    raise RuntimeError(f"JupyterLab did not start:\n{told}") from None
                time.sleep(0.2)

    def __exit__(self, *_) -> None:
        self.server.terminate()  # which ends its kernels too
        try:
            self.server.wait(20)
        except subprocess.TimeoutExpired:
            self.server.kill()
        self.log.close()


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """One page of a headless Chromium, the system's own."""
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=chromium(), headless=True, args=FLAGS)
        try:
            page = chrome.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(20_000)
            yield page
        finally:
            chrome.close()


class CellError(AssertionError):
    """A cell of the notebook raised."""


class Notebook:
    """A notebook that is open in ``page``. Cells go by their ids; pictures are told apart by their pixels."""

    def __init__(self, lab: Lab, page: Page, name: str):
        self.lab, self.page, self.name = lab, page, name
        self.cells = json.loads((lab.root / name).read_text(encoding="utf-8"))["cells"]
        page.goto(f"{lab.url}/lab/tree/{name}?reset&token={lab.token}")
        page.locator(".jp-Notebook").wait_for(timeout=60_000)
        self.wait_until_idle(60)
        page.wait_for_function(
            "n => document.querySelectorAll('.jp-Notebook .jp-Cell').length == n", arg=len(self.cells)
        )

    def close(self) -> None:
        """Shut the kernel down, so that the next notebook has the machine to itself."""
        request = urllib.request.Request(f"{self.lab.url}/api/sessions?token={self.lab.token}")
        with urllib.request.urlopen(request) as answer:
            for session in json.load(answer):
                path = f"{self.lab.url}/api/sessions/{session['id']}?token={self.lab.token}"
                urllib.request.urlopen(urllib.request.Request(path, method="DELETE")).close()

    # ---- cells ----

    def place(self, key: str) -> int:
        """The place of the cell with the id ``key`` among all cells."""
        return next(i for i, cell in enumerate(self.cells) if cell["id"] == key)

    def cell(self, key: str) -> Locator:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(self.place(key))

    def source(self, key: str) -> str:
        return "".join(self.cells[self.place(key)]["source"])

    def code(self, text: str) -> list[str]:
        """The ids of the code cells whose source has ``text`` in it."""
        return [c["id"] for c in self.cells if c["cell_type"] == "code" and text in "".join(c["source"])]

    def output(self, key: str) -> str:
        return self.cell(key).locator(".jp-OutputArea").first.inner_text()

    def screenshot(self, name: str, key: str | None = None) -> None:
        """Keep what the window shows, with the cell ``key`` in it, as ``name``.png."""
        if key is not None:
            self.cell(key).scroll_into_view_if_needed()
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=self.lab.folder / f"{name}.png")

    # ---- running ----

    def run_all(self) -> None:
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def wait_until_idle(self, seconds: float) -> None:
        """Wait for the status that a reader sees."""
        self.page.get_by_role("button", name=IDLE, exact=True).first.wait_for(timeout=1000 * seconds)

    def follow(self, seconds: float) -> dict[str, int]:
        """Wait until every cell has run and the kernel is idle; raise ``CellError`` as soon as one has failed.

        Returns for each cell how many pictures followed one another in one place of its output while it ran.
        """
        seen: dict[tuple[int, int], set[str]] = {}
        end = time.monotonic() + seconds
        while True:
            waiting, failed, pictures = self.page.evaluate(LOOK)
            if failed is not None:
                place, text = failed
                self.screenshot(f"{Path(self.name).stem}-error")
                raise CellError(f"{self.name}, cell {self.cells[place]['id']}: {text.strip()[-800:]}")
            for place, number, picture in pictures:
                seen.setdefault((place, number), set()).add(picture)
            if not waiting:
                break
            assert time.monotonic() < end, f"{self.name}: cells {waiting[:3]} have not run within {seconds:.0f} s"
            self.page.wait_for_timeout(150)
        self.wait_until_idle(20)
        counts: dict[str, int] = {}
        for (place, _), pictures in seen.items():
            key = self.cells[place]["id"]
            counts[key] = max(counts.get(key, 0), len(pictures))
        return counts

    def type_and_run(self, key: str, source: str, seconds: float = 60) -> str:
        """Replace the cell's source as a reader would, run it, and return what it says."""
        before = self.cell(key).locator(".jp-InputPrompt").inner_text()
        self.cell(key).locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(source)
        self.page.keyboard.press("Control+Enter")
        arrived = "([i, old]) => { const text = document.querySelectorAll('.jp-Notebook .jp-Cell')[i]"
        arrived += ".querySelector('.jp-InputPrompt').innerText; return text != old && !text.includes('*'); }"
        self.page.wait_for_function(arrived, arg=[self.place(key), before], timeout=1000 * seconds)
        self.wait_until_idle(seconds)
        return self.output(key)

    # ---- widgets ----

    def picture(self, key: str) -> str:
        """The pixels of the widget's picture in the cell, as a checksum."""
        return self.cell(key).locator(".jp-OutputArea img").first.evaluate(PIXELS)

    def move_slider(self, key: str, presses: int = 3) -> float:
        """Press an arrow key on the cell's first slider; returns the seconds until its picture is another one."""
        handle = self.cell(key).get_by_role("slider").first
        handle.scroll_into_view_if_needed()
        before, start = self.picture(key), time.monotonic()
        handle.focus()
        for _ in range(presses):
            self.page.keyboard.press("ArrowRight")
        while self.picture(key) == before:
            assert time.monotonic() - start < 10, f"{self.name}, cell {key}: the picture does not follow its slider"
            self.page.wait_for_timeout(20)
        return time.monotonic() - start


# The cells that still wait or run, the first error (place, text), and the pictures of what runs (cell, which, source).
LOOK = """() => {
  const cells = [...document.querySelectorAll('.jp-Notebook .jp-Cell')];
  const waiting = [], pictures = [];
  let failed = null;
  cells.forEach((cell, i) => {
    if (!cell.classList.contains('jp-CodeCell')) return;
    const error = cell.querySelector('[data-mime-type="application/vnd.jupyter.stderr"]');  // so are errors shown
    if (error && failed === null) failed = [i, error.innerText];
    const prompt = cell.querySelector('.jp-InputPrompt').innerText;
    if (!/\\d/.test(prompt)) waiting.push(i);
    if (prompt.includes('*'))
      cell.querySelectorAll('.jp-OutputArea-output img').forEach((img, j) => pictures.push([i, j, img.src]));
  });
  return [waiting, failed, pictures];
}"""
PIXELS = """async img => {
  for (let tries = 0; ; tries++) {  // while a picture takes the place of another, neither can be decoded
    try { await img.decode(); break; }
    catch (error) { if (tries == 50) throw error; await new Promise(wake => setTimeout(wake, 20)); }
  }
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [img.naturalWidth, img.naturalHeight];
  const context = canvas.getContext('2d');
  context.drawImage(img, 0, 0);
  const hash = await crypto.subtle.digest('SHA-256', context.getImageData(0, 0, canvas.width, canvas.height).data);
  return [...new Uint8Array(hash)].map(b => b.toString(16).padStart(2, '0')).join('');
}"""
