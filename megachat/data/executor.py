"""Who does the tasks of a step: this process, others on this machine, or Ray's on many.

The one file that imports ray. Ray gets tasks alone, no state and no data: they read and write files that
every machine sees, so a task that is lost is done again elsewhere.
"""

import functools
import multiprocessing
import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from megachat.config import Config

Task = Callable[[int], None]


class Executor(Config):
    """Runs tasks."""

    def run(self, task: Task, numbers: Sequence[int]) -> Iterator[int]:
        """Runs the task for every number, and yields each that is done. The first error ends it."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of what is kept from one step to the next."""


class Local(Executor):
    """Processes on this machine."""

    processes: NonNegativeInt
    """How many at once; 0: one per CPU core."""

    def run(self, task: Task, numbers: Sequence[int]) -> Iterator[int]:
        processes = min(self.processes or cores(), len(numbers))
        if processes <= 1:
            for number in numbers:
                task(number)
                yield number
            return
        with tempfile.NamedTemporaryFile(suffix=".task") as file:  # read once, not sent with every number
            pickle.dump(task, file)
            file.flush()
            pool = _pools.get(processes) or _pools.setdefault(processes, _pool(processes))
            waiting = {pool.submit(_do, file.name, number): number for number in numbers}
            try:
                for done in as_completed(waiting):
                    done.result()
                    yield waiting[done]
            except BrokenProcessPool:
                self.close()
                raise ValueError(
                    "a process was killed, perhaps for want of memory; what is done is kept: run the same "
                    f"command again, with fewer than executor.processes={processes} if it was memory"
                ) from None
            finally:
                for future in waiting:
                    future.cancel()
                wait(waiting)

    def close(self) -> None:
        """Ends the processes, which would otherwise wait for the next step."""
        while _pools:
            _pools.popitem()[1].shutdown(cancel_futures=True)


class Ray(Executor):
    """Ray's workers: of a cluster, or, with address=local, of this machine (https://docs.ray.io)."""

    address: str
    """Of the cluster's head; `auto` finds the one that this machine belongs to."""
    cores: PositiveInt
    """CPU cores that a task is given."""
    retries: NonNegativeInt
    """How often a task is tried again whose machine was lost."""

    def run(self, task: Task, numbers: Sequence[int]) -> Iterator[int]:
        try:
            import ray
        except ImportError:
            raise ValueError("executor=ray needs Ray; pip install 'megachat[ray]'") from None
        try:
            ray.init(self.address, ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
        except ConnectionError:
            raise ValueError(
                f"executor.address={self.address}: no Ray answers; start one with `ray start --head`, or set "
                "executor.address=local, which is this machine alone"
            ) from None
        home = os.getcwd()
        remote: Any = ray.remote(num_cpus=self.cores, max_retries=self.retries)(
            lambda task, number: _at(home, task, number)
        )
        sent = ray.put(task)  # once, not with every number
        waiting = {remote.remote(sent, number): number for number in numbers}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # its own text is a traceback
            except ray.exceptions.RayError as error:
                raise ValueError(
                    f"a task was lost {self.retries + 1} times ({type(error).__name__}), perhaps for want of "
                    "memory; what is done is kept: run the same command again, with more than "
                    f"executor.cores={self.cores} if it was memory"
                ) from None
            yield waiting.pop(done)


_pools: dict[int, ProcessPoolExecutor] = {}
"""By the number of processes: starting them takes seconds, which ten steps need not spend ten times."""


def _pool(processes: int) -> ProcessPoolExecutor:
    # spawn: the fork of a process with threads (NumPy's, the progress bar's) can hang.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin)


def _begin() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its processes: they would go on beside those of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(path: str, number: int) -> None:
    _task(path)(number)


@functools.lru_cache(maxsize=1)
def _task(path: str) -> Task:
    with open(path, "rb") as file:
        task: Task = pickle.load(file)  # our own, of a moment ago
    return task


def _at(home: str, task: Task, number: int) -> None:
    os.chdir(home)  # what relative paths are relative to
    task(number)


def cores() -> int:
    """The CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
