"""Processes of their own that need not import torch, which takes longer than most of what they do.

They are forked from a server that has imported it, with what torch.compile and FSDP need, and nothing else.  What
Python reads when it starts (options, encodings but PYTHONIOENCODING) and what torch does (OMP_NUM_THREADS) is as in the
server; anything else follows `env`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CONTEXT = multiprocessing.get_context("forkserver")
# Not torch._dynamo: it imports triton, which reads TRITON_INTERPRET.
PRELOADED = ["torch", "torch.export", "torch.fx.experimental.symbolic_shapes", "torch.distributed.fsdp"]
CONTEXT.set_forkserver_preload(PRELOADED)


def environment(*paths: Path | str, **variables: str | None) -> dict[str, str]:
    """This environment, for a Python that finds `paths` first, then `moealign` and the tests' modules; None unsets."""
    outer = os.environ.get("PYTHONPATH")
    search = [*paths, TESTS.parent / "src", TESTS, *([outer] if outer else [])]
    changed = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search)), **variables}
    return {name: value for name, value in changed.items() if value is not None}


class Process:
    """``python *arguments``, running: a script, ``-m module`` or ``-c code``, each with its arguments."""

    def __init__(self, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self.arguments = [str(each) for each in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        variables = environment() if env is None else dict(env)
        call = (self.arguments, variables, str(cwd or Path.cwd()), [str(each) for each in self._outputs])
        self._child = CONTEXT.Process(target=_run, args=call)
        self._child.start()

    def finish(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """What it printed and its exit status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it still ran after `timeout` seconds, and was killed.
        """
        self._child.join(timeout)
        late = self._child.is_alive()
        self.kill()
        out, err = (each.read_text() if each.exists() else "" for each in self._outputs)
        self._folder.cleanup()
        if late:
            raise subprocess.TimeoutExpired(self.arguments, timeout, out, err)
        return subprocess.CompletedProcess(self.arguments, self._child.exitcode or 0, out, err)

    def kill(self) -> None:
        self._child.kill()
        self._child.join()


def run(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """:class:`Process` until its end."""
    return Process(*arguments, env=env, cwd=cwd).finish(timeout)


def _run(arguments: list[str], env: dict[str, str], cwd: str, outputs: list[str]) -> None:
    """In the child: become what ``python *arguments`` would be."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
    sys.path[:0] = [each for each in env.get("PYTHONPATH", "").split(os.pathsep) if each]
    try:
        if arguments[0] == "-c":
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), vars(main))
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
