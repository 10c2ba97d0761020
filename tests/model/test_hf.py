"""A folder of weights is read by transformers, and computes there what it computes here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from megachat.model.gpt import GPT
from megachat.model.hf import settings, write
from megachat.model.moe import MoEConfig
from tests.model.test_gpt import TINY, VOCAB, some_tokens, tiny


def written(folder: Path, model: GPT, dtype: torch.dtype = torch.float32, shard: int = 2**30) -> Path:
    write(folder, model.config, model.vocab, model.named_parameters(), dtype, shard)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("shard", [2**30, 10_000])
def test_transformers_reads_the_folder_and_computes_the_same_logits(
    qk_norm: bool, tied: bool, shard: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokens = tiny(qk_norm=qk_norm, tied=tied, rope_base=5000.0), some_tokens(2, 40)
    folder = written(tmp_path / "out", model, shard=shard)
    sizes = [sum(one.nbytes for one in load_file(file).values()) for file in folder.glob("*.safetensors")]
    assert (len(sizes) == 1) == (sum(sizes) <= shard)
    assert max(sizes) <= shard
    read = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    theirs, told = read
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        mine, other = model(tokens), theirs.eval()(tokens).logits
    assert mine.abs().max() > 1
    assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_weights_are_rounded_to_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    model = tiny()
    folder = written(tmp_path / "out", model, torch.bfloat16)
    found = load_file(folder / "model.safetensors")
    assert torch.equal(
        found["model.layers.1.mlp.down_proj.weight"], model.blocks[1].mlp.down.weight.bfloat16()
    )
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_that_is_there_is_replaced_with_all_that_is_in_it(tmp_path: Path) -> None:
    written(tmp_path / "out", tiny(), shard=10_000)
    written(tmp_path / "out", tiny())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_a_mixture_of_experts_is_refused_by_the_name_of_its_setting() -> None:
    moe = MoEConfig(experts=2, per_token=1, balance=0.0, router_z=0.0)
    with pytest.raises(ValueError, match=r"model\.moe: .* moe=null"):
        settings(TINY.model_copy(update={"moe": moe}), VOCAB, torch.float32)
