"""`litgpt.py JOB.json`: LitGPT's own `litgpt pretrain`, with the job's rows and with a logger that tells.

It always compiles its model; with TORCH_COMPILE_DISABLE=1 in the environment torch leaves it as it is.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.loggers.logger import Logger
from litgpt import Config, pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from torch.utils.data import DataLoader, Dataset

from tools.bench.job import IGNORE, Job


class Rows(Dataset):
    """The rows of a job, with one label more behind each."""

    def __init__(self, job: Job) -> None:
        self.rows = np.load(job.rows, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(np.append(self.rows[number], IGNORE).astype(np.int64))


class Given(DataModule):
    """The job's rows in their order."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def connect(self, *_: Any, **__: Any) -> None:
        pass

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Rows(self.job), batch_size=self.job.micro_batch, shuffle=False)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


class Marks(Logger):
    """Tells of the steps between two marks."""

    name, version = "marks", 0

    def __init__(self, job: Job) -> None:
        self.job = job
        self.losses: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "loss" in metrics:
            self.losses.append(float(metrics["loss"]))
            if len(self.losses) == self.job.interval:
                self.job.mark(int(metrics["step"]), sum(self.losses) / len(self.losses))
                self.losses.clear()

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def main() -> None:
    """Trains."""
    job = Job.read(sys.argv[1])
    shape = job.model
    config = Config(
        name="megachat",
        block_size=job.context,
        vocab_size=job.vocab,
        padded_vocab_size=job.vocab,
        n_layer=shape["layers"],
        n_embd=shape["dim"],
        n_head=shape["heads"],
        n_query_groups=shape["kv_heads"],
        head_size=shape["head_dim"],
        intermediate_size=shape["hidden"],
        rotary_percentage=1.0,
        rope_base=int(shape["rope_base"]),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=shape["norm_eps"],
        mlp_class_name="LLaMAMLP",
    )
    pretrain.choose_logger = lambda *_, **__: Marks(job)
    with tempfile.TemporaryDirectory() as folder:
        pretrain.setup(
            "",
            config,
            out_dir=Path(folder),
            precision="bf16-mixed",
            data=Given(job),
            train=TrainArgs(
                save_interval=None,
                log_interval=1,
                global_batch_size=job.batch,
                micro_batch_size=job.micro_batch,
                max_tokens=job.steps * job.batch * job.context,
                max_norm=job.clip,
                min_lr=job.lr,
                lr_warmup_steps=0,
                max_seq_length=job.context,
                tie_embeddings=shape["tied"],
            ),
            eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
            optimizer={
                "class_path": "torch.optim.AdamW",
                "init_args": {
                    "lr": job.lr, "betas": job.betas, "eps": job.eps, "weight_decay": job.weight_decay,
                },
            },
            devices=1,
            logger_name="csv",
        )  # fmt: skip


if __name__ == "__main__":
    main()
