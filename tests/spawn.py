"""`@on_ranks(n)`: the body of a test runs in n processes on the CPU that find each other as `torchrun`'s do.

    @on_ranks(2)
    def test_two_ranks_agree(tmp_path: Path) -> None:
        ...

Fixtures and parameters reach every rank (they are pickled). The first rank to fail ends the test: its
traceback and what it printed are shown, and the others, which wait for it in a collective, are killed.
The processes fork from a server that has `PRELOAD` imported already, so that a rank starts in
milliseconds; the body is found again by name, as `module:function`.
"""

import functools
import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

Body = Callable[..., None]

PRELOAD = ["deepspeed", "torch._inductor.compile_fx", "datasketch", "grain", "wandb"]
"""What ranks import sooner or later, and slowly (DeepSpeed's engine imports torch's compiler)."""


def on_ranks(world: int, timeout: float = 600, device: str = "cpu") -> Callable[[Body], Body]:
    """Runs the decorated test in `world` processes, with RANK, WORLD_SIZE, MASTER_ADDR and their like set.

    After `timeout` seconds all are killed and the test fails. `device="cuda"` gives rank r the GPU r.
    """

    def decorate(body: Body) -> Body:
        @functools.wraps(body)
        def test(**arguments: Any) -> None:
            run(f"{body.__module__}:{body.__qualname__}", world, timeout, device, arguments)

        test.body = body  # type: ignore[attr-defined]
        return test

    return decorate


def run(name: str, world: int, timeout: float, device: str, arguments: dict[str, Any]) -> None:
    """Starts the ranks, waits for them, and raises what the first failing one reported."""
    forking = context(device)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks, pipes = [], []
        for rank in range(world):
            here, there = forking.Pipe(duplex=False)
            log = Path(folder) / f"rank{rank}.log"
            variables = environment(rank, world, port, device)
            process = forking.Process(
                target=_main, args=(there, name, arguments, variables, log), daemon=True
            )
            process.start()
            there.close()
            ranks.append(process)
            pipes.append(here)
        try:
            failures, skipped = _collect(pipes, timeout)
        finally:
            for process in ranks:
                process.join(0.5 if process.exitcode is None else 0)
                process.kill()
                process.join()
        if failures:
            shown = "\n".join(_shown(rank, text, Path(folder) / f"rank{rank}.log") for rank, text in failures)
            pytest.fail(f"{name} on {world} ranks\n{shown}", pytrace=False)
        if skipped:
            pytest.skip(skipped)


def _collect(pipes: list[Connection], timeout: float) -> tuple[list[tuple[int, str]], str]:
    """Reports of the ranks as they come. After a failure the others have a second to report theirs."""
    failures, skipped = [], ""
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            if not failures:
                stuck = ", ".join(str(rank) for rank in sorted(waiting.values()))
                failures = [
                    (rank, f"still running after {timeout:g} s: rank {stuck}") for rank in waiting.values()
                ]
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                kind, text = pipe.recv()
            except EOFError:
                kind, text = "failed", "the process died without a word (killed by a signal?)"
            if kind == "failed":
                failures.append((rank, text))
                deadline = min(deadline, time.monotonic() + 1.0)
            elif kind == "skipped":
                skipped = text
    return failures, skipped


def _shown(rank: int, text: str, log: Path) -> str:
    printed = log.read_text(encoding="utf-8", errors="replace")[-4000:].strip() if log.exists() else ""
    return f"--- rank {rank} ---\n{text.rstrip()}" + (
        f"\n--- rank {rank} printed ---\n{printed}" if printed else ""
    )


def _main(
    pipe: Connection, name: str, arguments: dict[str, Any], environment: dict[str, str], log: Path
) -> None:
    """One rank."""
    os.environ.clear()
    os.environ.update(environment)
    with log.open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        from jaxtyping import install_import_hook

        # As --jaxtyping-packages does in pytest's own process: shapes are checked here, too.
        install_import_hook("megachat", "beartype.beartype")
        import torch

        torch.set_num_threads(1)
        module, _, function = name.partition(":")
        test = functools.reduce(getattr, function.split("."), importlib.import_module(module))
        test.body(**arguments)  # type: ignore[attr-defined]
        report = ("passed", "")
    except pytest.skip.Exception as skip:
        report = ("skipped", str(skip))
    except BaseException:
        report = ("failed", traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send(report)
    pipe.close()
    # Without the clean-up at exit: process groups that are still open would wait for ranks that have gone.
    os._exit(0)


def environment(rank: int, world: int, port: int, device: str) -> dict[str, str]:
    """What makes a process rank `rank` of `world`, as torchrun would set it."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {
        **os.environ,
        **hidden,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": device,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@functools.cache
def context(device: str) -> Any:
    """Where processes come from: a server that has `PRELOAD` imported, but for GPUs."""
    if device == "cuda":  # the server has DeepSpeed set to the CPU already
        return multiprocessing.get_context("spawn")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(PRELOAD)
    return forking
