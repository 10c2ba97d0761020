"""Answers written by vLLM (Kwon et al., 2023, https://arxiv.org/abs/2309.06180), beside the training.

vLLM wants versions of its own of torch and others, so it lives in a Python environment of its own, and
`vllm_server.py` runs there. Rank 0 starts one such server, for all ranks. Whenever weights have changed since
it last wrote, all ranks bring them together, rank 0 writes them to memory as a folder of safetensors, and the
server takes them in place and forgets the prefixes that it has computed.

A server with other weights than the trainer's, or with kernels that compute something else, would teach
the policy from answers that are not its own. So the log-probability that vLLM gives each token is compared
with what the trainer computes for it, in every rollout: `most_error` is where it ends.

With `ahead` a rollout is written while the trainer learns from the one before, so by weights that are one
rollout old (Noukhovitch et al., 2024, https://arxiv.org/abs/2410.18252). The ratio starts from the policy as
it is when they arrive, and `importance_cap` weighs each token by how much likelier it is to that than to its
writer (truncated importance sampling). The comparison is made when weights are sent, with a few answers.
"""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from megachat.align.answers import Answer
from megachat.config import Config
from megachat.model import hf
from megachat.model.generate import Sampling
from megachat.model.lora import LoRA, summed
from megachat.parallel import checkpoint
from megachat.train.loop import Running

SCRIPT = Path(__file__).with_name("vllm_server.py")
MEMORY = Path("/dev/shm")
"""A file system in memory, for weights on their way."""
LOOK = 1.0
"""Seconds between two looks at whether to stop, while the server writes."""
QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which ends with ours
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
OURS = (
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "OMP_NUM_THREADS",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables that mean something else there."""


Request = dict[str, Any]
"""What the server is asked to write."""


def asking(
    run: Running, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
) -> Request:
    """For an answer to each prompt, which follows from its seed."""
    return {
        "prompts": [[*prompt] for prompt in prompts],
        "seeds": [seed % 2**63 for seed in seeds],  # as large as theirs may be
        "temperature": sampling.temperature,
        "most": sampling.max_new_tokens,
        "end": run.tokenizer.end,
    }


class VLLM(Config):
    """vLLM writes the answers, not the module that trains."""

    python: str
    """The interpreter of the environment that has vLLM."""
    devices: str | None
    """The GPUs it may use, as CUDA_VISIBLE_DEVICES; null: those that rank 0 sees. A GPU can serve both,
    within `memory`."""
    tensor: PositiveInt
    """GPUs that share the model."""
    memory: Annotated[float, Field(gt=0, le=1)]
    """Of each GPU, the share that it may take."""
    cpu_gib: NonNegativeInt
    """Without a GPU, GiB for keys and values; 0: vLLM chooses."""
    dtype: Literal["auto", "float32", "bfloat16"]
    """It computes in; `auto`: what the model in training computes in."""
    eager: bool
    """Without compiling and CUDA graphs: slower, but there at once."""
    most_error: Annotated[float, Field(gt=1)] | None
    """By what factor a token may be likelier to one of the two than to the other, in the mean of a rollout
    (`sampler/error`, 1 is not at all), before the run is ended; null: 1.01 where vLLM computes in fp32, 1.05
    in bf16."""
    ahead: bool
    """Whether the next rollout is written while the policy learns from this one."""
    patience: PositiveFloat
    """Seconds that starting it, or one request, may take."""

    def written(self, run: Running, server: "Server", request: Request) -> list[Answer]:
        """An answer to each prompt of a request, on all ranks, which call it together.

        Raises Stopped when asked to stop meanwhile.
        """
        if server.ahead is not None and server.ahead[1] == request:
            number, server.ahead = server.ahead[0], None
        else:
            number = self._begun(run, server, request)
        reply = server.waited(run, number)
        return [Answer(*one) for one in zip(reply["tokens"], reply["logps"], strict=True)]

    def begin(self, run: Running, server: "Server", request: Request) -> None:
        """Has it answered by the weights of now while the trainer goes on; `written` will want it."""
        server.ahead = self._begun(run, server, request), request

    def _begun(self, run: Running, server: "Server", request: Request) -> int:
        if server.holds != run.progress.step:
            self._send(run, server)
        return server.begun(run, "write", **request)

    def check(self, error: float, run: Running) -> None:
        """Of a rollout."""
        most = self.most_error or (1.01 if self._dtype(run) == torch.float32 else 1.05)
        if not error < most:
            raise ValueError(
                f"engine.most_error={most}: vLLM's probability of a token and the trainer's differ by a "
                f"factor of {error:.4g} in the mean of a rollout, so these are not the policy's answers; set "
                "engine.dtype=float32 and parallel.precision=fp32 to see if it is rounding, then raise "
                "engine.most_error and set importance_cap=2, or use engine=builtin"
            )

    def _send(self, run: Running, server: "Server") -> None:
        engine = run.engines["model"]
        trunk = checkpoint.trunk(engine.module)
        # vLLM 0.32 does not reload a head that is the embedding: it is given one of its own.
        config = trunk.config.model_copy(update={"tied": False})
        plain = engine.weights() if server.lora is None else summed(engine.weights(), server.lora)
        weights = _untied(plain, trunk.config.tied)
        dtype = self._dtype(run)
        failed: OSError | ValueError | None = None
        if run.mesh.rank == 0:
            try:
                hf.write(server.place(engine.shapes), config, trunk.vocab, weights, dtype)
            except (OSError, ValueError) as error:
                failed = error
        for _ in weights:  # ranks bring them together, also when it is of no use any more
            pass

        def wrong() -> None:
            if failed is not None:
                raise failed

        run.mesh.lead(wrong)
        settings: dict[str, Any] = {}
        if server.holds is None:
            settings = {
                "dtype": str(dtype).removeprefix("torch."),
                "max_model_len": trunk.config.context,
                "enforce_eager": self.eager,
                "tensor_parallel_size": self.tensor,
                "gpu_memory_utilization": self.memory,
            }
        server.asked(run, "load", folder=str(server.folder), **settings)
        server.holds = run.progress.step

    def _dtype(self, run: Running) -> torch.dtype:
        if self.dtype != "auto":
            return torch.float32 if self.dtype == "float32" else torch.bfloat16
        return torch.bfloat16 if run.engines["model"].parallel.bf16 else torch.float32


def _untied(weights: Iterator[tuple[str, Tensor]], tied: bool) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights:
        yield name.removeprefix("weight."), weight
        if tied and name == "weight.embed.weight":
            yield "head.weight", weight.clone()


class Server:
    """vLLM's process, which rank 0 holds; other ranks hear what it says."""

    def __init__(self, settings: VLLM, lora: LoRA | None, log: Path) -> None:
        """It starts with the first request. What it prints goes to `log`; `lora` is the trained model's."""
        self.settings, self.lora, self.log = settings, lora, log
        self.holds: int | None = None
        """Of which step its weights are; None: it has none."""
        self.folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.ahead: tuple[int, Request] | None = None
        """The number of a request whose answers nobody has waited for yet, and what it asks."""
        self._numbers = 0
        self._replies: dict[int, dict[str, Any]] = {}
        """By the number of their request, until they are waited for."""
        self._part = b""
        """Of a reply that is not all here."""

    def place(self, shapes: Mapping[str, torch.Size]) -> Path:
        """Where to put weights of these shapes: in memory if they fit there twice, else beside the log."""
        if self.folder is None:
            size = 4 * sum(shape.numel() for shape in shapes.values())
            roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 3 * size
            parent = tempfile.mkdtemp(prefix="megachat-vllm-", dir=MEMORY if roomy else self.log.parent)
            weakref.finalize(self, shutil.rmtree, parent, ignore_errors=True)
            self.folder = Path(parent) / "model"
        return self.folder

    def asked(self, run: Running, verb: str, **what: Any) -> dict[str, Any]:
        """What it replies, on all ranks, which call it together."""
        return self.waited(run, self.begun(run, verb, **what))

    def begun(self, run: Running, verb: str, **what: Any) -> int:
        """The number of a request that it is given."""
        self._numbers += 1
        run.watch.at("rollout")
        run.mesh.lead(lambda: self._ask(verb, what))
        return self._numbers

    def waited(self, run: Running, number: int) -> dict[str, Any]:
        """The reply to a request, on all ranks; they look meanwhile whether to stop."""
        begun = time.monotonic()
        while True:
            reply, late = run.mesh.lead(
                lambda: (self._reply(number), time.monotonic() - begun > self.settings.patience)
            )
            if reply is not None:
                return reply
            if late:
                raise ValueError(
                    f"engine.patience={self.settings.patience:g}: vLLM has not replied for so many "
                    f"seconds; see {self.log}, or raise it"
                )
            run.watch.at("rollout")
            run.pause()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _ask(self, verb: str, what: dict[str, Any]) -> None:
        if self._process is None:
            self._process = self._started()
        request = {"number": self._numbers, "do": verb, **what}
        try:
            _pipe(self._process.stdin).write(json.dumps(request).encode() + b"\n")
            _pipe(self._process.stdin).flush()
        except BrokenPipeError:
            raise self._died() from None

    def _reply(self, number: int) -> dict[str, Any] | None:
        """The reply to a request, if it comes within a moment; others that come are kept."""
        assert self._process is not None
        pipe = _pipe(self._process.stdout)
        while number not in self._replies:
            if not select.select([pipe], [], [], LOOK)[0]:
                return None
            piece = os.read(pipe.fileno(), 2**20)
            if not piece:
                raise self._died()
            *whole, self._part = (self._part + piece).split(b"\n")
            for line in whole:
                reply: dict[str, Any] = json.loads(line)
                self._replies[reply.pop("number")] = reply
        reply = self._replies.pop(number)
        if "error" in reply:
            raise ValueError(f"vLLM: {reply['error']}; see {self.log}")
        return reply

    def _started(self) -> "subprocess.Popen[bytes]":
        python = Path(self.settings.python)
        if not python.is_file():
            raise ValueError(
                f"engine.python={python} does not exist; `bash tools/bench/setup.sh vllm` makes one "
                "with vLLM's CPU build; for GPUs: python -m venv vllm && vllm/bin/pip install vllm, and "
                "engine.python=vllm/bin/python"
            )
        known = {name: value for name, value in os.environ.items() if name not in OURS}
        known |= QUIET
        if self.settings.devices is not None:
            known["CUDA_VISIBLE_DEVICES"] = self.settings.devices
        if self.settings.cpu_gib:
            known["VLLM_CPU_KVCACHE_SPACE"] = str(self.settings.cpu_gib)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [str(python), "-I", str(SCRIPT)],  # without its folder, where this file is vllm
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=known,
                start_new_session=True,  # what is sent to our group is for us to pass on
            )
        weakref.finalize(self, _end, process)
        return process

    def _died(self) -> ValueError:
        assert self._process is not None
        status = self._process.wait()
        last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        told = "".join(f"\n  {line[:300]}" for line in last)
        return ValueError(f"vLLM has ended with status {status}; {self.log} ends with:{told}")


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
