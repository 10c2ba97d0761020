"""Models of few weights, and folders that look as if a stage had trained them."""

from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import nn

from megachat.files import sha256, write_json
from megachat.parallel.checkpoint import architecture
from megachat.parallel.engine import Parallel
from megachat.stages import CONF
from megachat.tokenizer.tokenizer import FILE, Tokenizer


def shape(dim: int, heads: int, **sizes: int) -> dict[str, Any]:
    """The settings of a small GPT."""
    fixed = {
        "moe": None,
        "rope_base": 10000.0,
        "qk_norm": True,
        "tied": True,
        "norm_eps": 1e-6,
        "dropout": 0.0,
    }
    target = {"_target_": "megachat.model.gpt.GPTConfig"}
    return target | {"dim": dim, "heads": heads, "head_dim": dim // heads} | sizes | fixed


def spread(**changed: Any) -> Parallel:
    """conf/parallel/zero0.yaml, but for what is changed."""
    settings = yaml.safe_load((CONF / "parallel" / "zero0.yaml").read_text())
    return Parallel(**{name: value for name, value in settings.items() if name != "_target_"} | changed)


def write_model(folder: Path, model: nn.Module, tokenizer: Tokenizer) -> None:
    """A finished training stage that ended with this model."""
    checkpoint = folder / "checkpoints" / "step-00000007"
    checkpoint.mkdir(parents=True)
    tensors = {f"model/weight.{name}": value.detach().clone() for name, value in model.named_parameters()}
    file = checkpoint / "tensors.safetensors"
    save_file(tensors, file)
    facts = {"bytes": file.stat().st_size, "sha256": sha256(file), "tensors": sorted(tensors)}
    about = {"architecture": {"model": architecture(model)}, "tokenizer": tokenizer.sha256}
    write_json(checkpoint / "manifest.json", about | {"progress": {"step": 7}, "files": {file.name: facts}})
    tokenizer.save(folder / FILE)
    finish(folder)


def finish(folder: Path, seconds: float = 1.5) -> None:
    """Marks a stage as done."""
    write_json(
        folder / "done.json", {"fingerprint": "0", "seconds": seconds, "outputs": {}, "finished": "today"}
    )
