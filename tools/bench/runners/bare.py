"""`bare.py JOB.json bf16|autocast`: megachat's model in the shortest loop that trains it, with plain torch.

`bf16` computes with bf16 weights, adds gradients up in fp32, and steps fp32 copies of the weights, as ZeRO 1
to 3 do; `autocast` keeps fp32 weights and computes in bf16 where it may, as ZeRO 0 does.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megachat.model.gpt import GPT, GPTConfig
from tools.bench.job import Job


def train(job: Job, autocast: bool) -> None:
    """All steps of the job."""
    torch.manual_seed(0)
    model = GPTConfig(**job.model).build(job.vocab).to(job.device)
    for block in model.blocks:
        block.checkpointing = "full" if job.checkpointing else "none"
    masters = [*model.parameters()] if autocast else copies(model)
    groups = [
        {"params": [one for one in masters if one.ndim >= 2], "weight_decay": job.weight_decay},
        {"params": [one for one in masters if one.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=job.lr, betas=job.betas, eps=job.eps, fused=True)
    total = torch.zeros((), device=job.device)
    for number in range(job.steps):
        total += step(job, number, model, masters, optimizer, autocast)
        if (number + 1) % job.interval == 0:
            job.mark(number + 1, total.item() / job.interval)
            total.zero_()


def step(
    job: Job,
    number: int,
    model: GPT,
    masters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    autocast: bool,
) -> Tensor:
    """One optimizer step; what a token cost."""
    total = torch.zeros((), device=job.device)
    for inputs, labels in job.micro_batches(number):
        x, y = (torch.from_numpy(one).to(job.device) for one in (inputs, labels))
        with torch.autocast(job.device, torch.bfloat16, enabled=autocast):
            loss = model(x, labels=y) / (job.batch * (job.context - 1))
        loss.backward()
        total += loss.detach()
        if not autocast:
            add_up(model, masters)
    nn.utils.clip_grad_norm_(masters, job.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=autocast)
    if not autocast:
        give_back(model, masters)
    return total


def copies(model: nn.Module) -> list[Tensor]:
    """The weights in fp32, with room for gradients; the model keeps them in bf16."""
    masters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    for master in masters:
        master.grad = torch.zeros_like(master)
    model.bfloat16()
    return masters


def add_up(model: nn.Module, masters: Sequence[Tensor]) -> None:
    """Moves the gradients of a micro-batch to the fp32 copies."""
    for parameter, master in zip(model.parameters(), masters, strict=True):
        assert master.grad is not None, "made with the copies"
        master.grad += parameter.grad
        parameter.grad = None


@torch.no_grad()
def give_back(model: nn.Module, masters: Sequence[Tensor]) -> None:
    """Rounds the fp32 copies to the weights that compute."""
    torch._foreach_copy_([*model.parameters()], [*masters])


if __name__ == "__main__":
    train(Job.read(sys.argv[1]), sys.argv[2] == "autocast")
