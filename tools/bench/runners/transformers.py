"""`transformers.py JOB.json [compile]`: LlamaForCausalLM in transformers' Trainer, in bf16.

Whatever the job does not say is as Trainer has it by default.
"""

import sys
import tempfile
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tools.bench.job import Job


class Rows(Dataset):
    """The rows of a job."""

    def __init__(self, job: Job) -> None:
        self.rows = np.load(job.rows, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self.rows[number].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}  # the model shifts them


class Marks(TrainerCallback):
    """Tells of every logged step."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_log(
        self,
        _: TrainingArguments,
        state: TrainerState,
        __: TrainerControl,
        logs: dict[str, float],
        **___: Any,
    ) -> None:
        if "loss" in logs:
            self.job.mark(state.global_step, float(logs["loss"]))


def main() -> None:
    """Trains."""
    job = Job.read(sys.argv[1])
    torch.manual_seed(0)
    shape = job.model
    config = LlamaConfig(
        vocab_size=job.vocab,
        hidden_size=shape["dim"],
        intermediate_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=job.context,
        rms_norm_eps=shape["norm_eps"],
        tie_word_embeddings=shape["tied"],
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=job.micro_batch,
            gradient_accumulation_steps=job.batch // job.micro_batch,
            max_steps=job.steps,
            bf16=True,
            use_cpu=job.device == "cpu",
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            adam_beta1=job.betas[0],
            adam_beta2=job.betas[1],
            adam_epsilon=job.eps,
            weight_decay=job.weight_decay,
            max_grad_norm=job.clip,
            gradient_checkpointing=job.checkpointing,
            torch_compile="compile" in sys.argv[2:],
            train_sampling_strategy="sequential",
            logging_steps=job.interval,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=Rows(job), callbacks=[Marks(job)]).train()


if __name__ == "__main__":
    main()
