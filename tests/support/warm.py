"""Processes of their own that start in a moment: imports take ten seconds of a processor each time.

A server (:mod:`multiprocessing`'s) imports once what :mod:`tests.support.preloaded` names and
forks. What comes of it is as much a process as any: it has its own number, session, environment and
end, can be killed, and shares no state with who asked for it. What forks of one server share is the
order of their sets and what ran at import; so what a run in a fork is compared with is made in a
new interpreter, or in that of the test.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import numpy as np

from tests.support.processes import script_environment
from tests.support.waiting import PATIENCE, held_port, port_of

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.support.preloaded"])
_PR_SET_PDEATHSIG = 1
#: what the server asks for from Python 3.14 on; its forks are not told
_KEY = "_forkserver_authkey"
#: What a script leaves when it ends, which is the end of its process. Let go of before, a process
#: group of gloo joins its threads while it holds the interpreter's lock, which they may wait for.
_LEFT: list[Any] = []


class _Descriptor:
    """A file descriptor that reaches the other process when this is pickled."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getstate__(self) -> Any:
        return DupFd(self.number)

    def __setstate__(self, sent: Any) -> None:
        self.number = sent.detach()


class Process:
    """What of :class:`subprocess.Popen` tests use, for commands of this very interpreter.

    Args:
        command: ``[sys.executable, SCRIPT, ...]``, with ``-m MODULE`` or ``-c CODE`` for SCRIPT.
        env: the whole environment; None takes that of this process.
        cwd: where it runs; None is here.
        stdout, stderr: ``subprocess.PIPE``, ``DEVNULL``, ``STDOUT``; None is where ours goes.
        process_group: 0 makes it, and what it starts, a group of its own; None stays in ours.
        text: as it always is.
    """

    def __init__(
        self,
        command: Sequence[object],
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        process_group: int | None = None,
        text: bool = True,
    ) -> None:
        first, *self.args = map(str, command)
        assert first == sys.executable, first
        self.returncode: int | None = None
        self._files: list[IO[bytes] | None] = []
        numbers: list[int] = []
        for wanted, own in ((stdout, 1), (stderr, 2)):
            made = wanted in (subprocess.PIPE, subprocess.DEVNULL)
            file = tempfile.TemporaryFile() if made else None  # noqa: SIM115 - read at its end
            self._files.append(file)
            merged = wanted == subprocess.STDOUT
            numbers.append(file.fileno() if file else numbers[0] if merged else own)
        environment = dict(os.environ if env is None else env)
        # Where ranks that Lightning starts meet; it would look up a free one and let it go again.
        self._port = None if "MASTER_PORT" in environment else held_port()
        if self._port:
            environment["MASTER_PORT"] = str(port_of(self._port))
        group = os.getpgrp() if process_group is None else process_group
        # The server may have to be started. And a fork would first run the main module of this one.
        with (
            patch.dict(os.environ, {**script_environment(), "MKL_CBWR": "COMPATIBLE"}),
            patch.dict(sys.modules, {"__main__": types.ModuleType("__main__")}),
        ):
            forkserver.ensure_running()
            where = (cwd or Path.cwd(), *map(_Descriptor, numbers), group)
            key = getattr(getattr(forkserver, "_forkserver", None), _KEY, None)
            self._process = _SERVER.Process(
                target=_become, args=(self.args, environment, *where, key)
            )
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status, minus the signal if one ended it; None while it runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        assert self.returncode is not None
        if self._port:
            self._port.close()
        return self.returncode

    def communicate(self, timeout: float = PATIENCE) -> tuple[str | None, str | None]:
        self.wait(timeout)
        found: list[str | None] = []
        for file in self._files:
            if file is None:
                found.append(None)
                continue
            with file:
                file.seek(0)
                found.append(file.read().decode())
        return found[0], found[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[object],
    timeout: float = PATIENCE,
    capture_output: bool = False,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """As :func:`subprocess.run`; nothing waits without end."""
    if capture_output:
        options["stdout"] = options["stderr"] = subprocess.PIPE
    process = Process(command, **options)
    try:
        said, complained = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    done = subprocess.CompletedProcess(
        [*map(str, command)], process.returncode, said or "", complained or ""
    )
    if check:
        done.check_returncode()
    return done


def run_ranks(
    command: Sequence[object], count: int, env: Mapping[str, str]
) -> list[subprocess.CompletedProcess[str]]:
    """The same command as ``count`` processes that meet, as torchrun starts them."""
    held = held_port()
    running = [
        Process(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={
                **env, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port_of(held)),
            },
        )
        for rank in range(count)
    ]  # fmt: skip
    done = []
    try:
        for process in running:
            said, complained = process.communicate()
            assert process.returncode is not None
            done.append(
                subprocess.CompletedProcess(
                    process.args, process.returncode, said or "", complained or ""
                )
            )
    finally:
        for process in running:
            process.kill()
        held.close()
    return done


def _become(
    words: list[str],
    environment: dict[str, str],
    cwd: Path | str,
    out: _Descriptor,
    error: _Descriptor,
    group: int,
    key: bytes | None,
) -> None:
    """In the fork: turn into what ``python WORDS`` would be, and run it."""
    from lightning.fabric.utilities.rank_zero import _get_rank
    from lightning.pytorch.strategies.launchers import subprocess_script
    from lightning_utilities.core.rank_zero import rank_zero_only

    if sys.platform == "linux":  # tests that are killed would leave what waits for others
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # when the server is gone
    os.setpgid(0, group)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.dup2(out.number, 1)
    os.dup2(error.number, 2)
    np.random.seed()  # noqa: NPY002 - forks would all draw the same; Python's own sees to itself
    rank_zero_only.rank = _get_rank() or 0  # looked up at import
    server: Any = getattr(forkserver, "_forkserver", None)
    if hasattr(server, "ensure_running") and hasattr(server, "_forkserver_address"):
        # It is running, but a fork does not know that: one that asks for another takes this one.
        server.ensure_running = forkserver.ensure_running = lambda: None
        setattr(server, _KEY, key)
        # Ranks that Lightning starts are forked too. (Elsewhere it starts them as it always does.)
        subprocess_script.subprocess = types.SimpleNamespace(Popen=Process)  # type: ignore[attr-defined]
    kind, *rest = words
    if kind == "-m":
        sys.argv = rest
        sys.path.insert(0, str(cwd))
        sys.modules.pop(rest[0], None)
        _LEFT.append(runpy.run_module(rest[0], run_name="__main__", alter_sys=True))
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, str(cwd))
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(kind).resolve().parent))
        _LEFT.append(runpy.run_path(kind, run_name="__main__"))
