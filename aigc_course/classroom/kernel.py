"""A kernel for what someone else wrote: an empty folder of its own, limits of time and memory, and no orphans."""

import os
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any

from ..runtime import CourseError, data_dir

START = 180.0  # seconds; torch is imported meanwhile, perhaps by several at once
TICK = 0.1
REPLY = 20_000_000  # bytes; what is printed is never fetched
LIMITS = f"""def _limits():
    import contextlib, sys
    with contextlib.suppress(Exception):
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, ({2**30}, {2**30}))
    with contextlib.suppress(Exception):  # if memory runs out all the same, this one goes first
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
_limits()
del _limits"""


class Lost(Exception):
    """The kernel is not to be used any more: ``status`` is "slow", "memory" or "crashed", and a sentence says why."""

    def __init__(self, status: str, text: str):
        super().__init__(text)
        self.status = status


class Stopped(Exception):
    """Grading has been stopped."""


class Kernel:
    """A context: a fresh kernel in a temporary folder that holds ``files``, and no process of it afterwards."""

    def __init__(self, files: dict[str, bytes], megabytes: float, stop: threading.Event):
        self.files, self.megabytes, self.stop, self.seen = files, megabytes, stop, set()

    def __enter__(self) -> "Kernel":
        import zmq
        from jupyter_client.manager import KernelManager

        self.temporary = tempfile.TemporaryDirectory(prefix="aigc-grade-", ignore_cleanup_errors=True)
        self.folder = Path(self.temporary.name).resolve()
        work = self.folder / "work"
        work.mkdir()
        for name, data in self.files.items():
            (work / name).write_bytes(data)
        self.mark = str(self.folder / "runs")
        self.context = zmq.Context()
        self.context.setsockopt(zmq.MAXMSGSIZE, REPLY)
        self.manager = KernelManager(
            kernel_name="python3", connection_file=str(self.folder / "kernel.json"), context=self.context
        )
        self.client = None
        try:
            self.manager.start_kernel(
                cwd=str(work),
                env=self._environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                extra_arguments=["--log-level=CRITICAL", "--HistoryManager.enabled=False"],
            )
            self.process = self.manager.provisioner.process
            self.client = self.manager.client(context=self.context)
            # Without the channel of outputs, they are dropped at their source, however many there are.
            self.client.start_channels(iopub=False, stdin=False, hb=False, control=False)
            self._reply(self.client.kernel_info(), START, unlimited=True)
            self.run(LIMITS, START)
        except Lost as lost:
            self.__exit__()
            raise CourseError(f"no kernel for grading starts: {lost} (aigc doctor looks at this machine)") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        import psutil

        if self.client is not None:
            self.client.shell_channel.stop()
        last = self._processes()
        with suppress(Exception):
            self.manager.shutdown_kernel(now=True)
        for _ in range(20):
            if not last:
                break
            for process in last:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(last, timeout=0.5)
            last = self._processes()
        self.context.destroy(linger=0)
        self.temporary.cleanup()

    def run(self, code: str, seconds: float, expression: str = "") -> dict[str, Any]:
        """What the kernel replies to ``code``; the value of ``expression``, computed after it, stands under "value".

        Raises ``Lost`` once the kernel has ended, or holds more memory than it may, or is not done after ``seconds``.
        """
        wanted = {"value": expression} if expression else {}
        clean = code.encode("utf-8", errors="replace").decode("utf-8")
        sent = self.client.execute(
            clean, store_history=False, user_expressions=wanted, allow_stdin=False, stop_on_error=False
        )
        reply = self._reply(sent, seconds)
        return {**reply, "value": reply.get("user_expressions", {}).get("value", {})}

    def _reply(self, sent: str, seconds: float, unlimited: bool = False) -> dict[str, Any]:
        end, over = time.monotonic() + seconds, 0
        while True:
            with suppress(Empty):
                reply = self.client.get_shell_msg(timeout=TICK)
                if reply["parent_header"].get("msg_id") == sent:
                    return reply["content"]
            if self.stop.is_set():
                raise Stopped
            if self.process.poll() is not None:
                code = self.process.returncode
                how = f"by signal {-code}" if code < 0 else f"with status {code}"
                raise Lost("crashed", f"the kernel ended {how}.")
            used = self._memory() / 1e6
            over = over + 1 if used > self.megabytes and not unlimited else 0
            if over == 2:  # a child that has just been forked counts its parent's memory for a moment
                raise Lost("memory", f"stopped at {used:.0f} MB of memory, of {self.megabytes:g} allowed.")
            if time.monotonic() > end:
                raise Lost("slow", f"stopped after {seconds:.3g} seconds. Is there a loop that never ends?")

    def _memory(self) -> int:
        """The bytes that the kernel and its children hold; all are remembered, also for when their parent has ended."""
        import psutil

        total = 0
        with suppress(psutil.Error):
            kernel = psutil.Process(self.process.pid)
            self.seen.update([kernel, *kernel.children(recursive=True)])
        for process in list(self.seen):
            try:
                own = process.pid == self.process.pid  # its children share pages with it
                total += process.memory_info().rss if own else process.memory_full_info().uss
            except psutil.NoSuchProcess:
                self.seen.discard(process)
            except psutil.Error:  # it is not to be looked at
                pass
        return total

    def _processes(self) -> list:
        """What is alive of the kernel and of what it started, told by ancestry and by the environment."""
        import psutil

        found = set(self.seen)
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get("AIGC_RUN_DIR") == self.mark:
                    found.add(process)
        alive = []
        for process in found:
            with suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        return alive

    def _environment(self) -> dict[str, str]:
        own = {
            "AIGC_RUN_DIR": self.mark,
            "AIGC_RECORD_DIR": str(self.folder / "records"),
            "AIGC_DATA_DIR": str(data_dir()),
            "AIGC_PROFILE": "quick",
            "IPYTHONDIR": str(self.folder / "ipython"),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.folder),
            "TEMP": str(self.folder),
        }
        return {**os.environ, **own}
