"""A tiny model of ours trained with a plain DeepSpeed engine, as somebody would have without megachat."""

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megachat.model.gpt import GPTConfig

TINY = GPTConfig(
    dim=20, layers=2, heads=2, kv_heads=2, head_dim=8, hidden=18, context=16,
    rope_base=1e4, moe=None, qk_norm=True, tied=True, norm_eps=1e-6, dropout=0.0,
)  # fmt: skip
"""Sizes that two ranks do not divide: 20 x 53 in the embedding, norms of 20 and 8."""
VOCAB = 53


def deepspeed_engine(config: dict[str, Any], vocab: int = VOCAB, frozen: bool = False) -> Any:
    """The engine. With `frozen` the last norm is not trained."""
    import deepspeed

    from megachat.parallel.engine import _quiet  # it also keeps DeepSpeed from compiling for 90 s

    torch.manual_seed(0)
    model = TINY.build(vocab)
    model.norm.requires_grad_(not frozen)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    common = {
        "train_micro_batch_size_per_gpu": 1, "steps_per_print": 2**31, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    optimizer = None if "optimizer" in config else partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95))
    with _quiet():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            optimizer=optimizer,
            config=common | config,
            dist_init_required=False,
        )
    return engine


def loss_of(engine: Any, step: int, data_rank: int) -> Tensor:
    """The mean loss of a step's batch."""
    draw = torch.Generator().manual_seed(100 * step + data_rank)
    tokens = torch.randint(VOCAB, (2, 13), generator=draw)
    logits = engine(tokens[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(engine: Any, steps: range, data_rank: int) -> list[float]:
    """Takes steps; the loss of each."""
    losses = []
    for step in steps:
        loss = loss_of(engine, step, data_rank)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def save(engine: Any, folder: Path) -> None:
    """`engine.save_checkpoint`, without its prints."""
    from megachat.parallel.engine import _quiet

    with _quiet():
        engine.save_checkpoint(str(folder))


def convert(folder: Path) -> Path:
    """`ds_to_universal`, as on the command line."""
    from deepspeed.checkpoint.ds_to_universal import main

    from megachat.parallel.engine import _quiet

    files = folder / (folder / "latest").read_text()
    out = folder.parent / "universal" / f"{files.name}_universal"
    with _quiet():
        main(
            Namespace(
                input_folder=str(files), output_folder=str(out), num_extract_workers=1, num_merge_workers=1,
                keep_temp_folder=False, strict=True, inject_missing_state=True,
            )
        )  # fmt: skip
    return out
