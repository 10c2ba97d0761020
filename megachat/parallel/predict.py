"""How fast a layout would train on a cluster that nobody has run it on: by arithmetic, with its assumptions.

A step takes what its products take on GPUs that wait for nobody, and what it waits for the network. A ring of
n ranks moves (n - 1) / n of a tensor at the speed of its slowest link (Patarasu and Yuan, 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002); a group of several GPUs on each node uses the adapters of all of
them. What DeepSpeed 0.19.8 does while the products go on is hidden behind them, for nothing and up to their
time: the sums of ZeRO 2 behind the backward pass, all of ZeRO 3 behind both. Waited for in full are the sums
of tensor parallelism, or what ranks that share rows exchange, in the middle of every block; those of ZeRO 0
and 1, which come after the last backward pass; and the weights that ZeRO 1 and 2 gather after the step.

Left out are the optimizer's own arithmetic, the loader, checkpoints, stragglers and failures
(`tools/bench/effective.py` has the last two).
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from megachat.model.gpt import GPTConfig
from megachat.model.size import Flops, Work, flops_per_token
from megachat.parallel.volume import Layout, Sent, volume


@dataclass(frozen=True, slots=True)
class Cluster:
    """GPUs and what connects them."""

    peak: float
    """FLOP/s of one GPU, by its data sheet."""
    efficiency: Mapping[int, float]
    """The share of it that a model reaches, with all that lies between its products, on a GPU that waits for
    nobody: by the model's width, for the products of narrow ones are small."""
    within: float
    """Bytes a second that a GPU sends to others of its node."""
    between: float
    """Bytes a second that a GPU sends to other nodes."""
    used: float
    """The share of both that collectives reach."""
    near: float
    """Seconds from one GPU of a node to the next."""
    far: float
    """Seconds from one node to the next."""
    per_node: int
    """GPUs of a node."""


H100 = Cluster(
    peak=989e12,
    efficiency={768: 0.40, 1152: 0.46, 1536: 0.50, 4096: 0.55},
    within=450e9, between=50e9, used=0.8, near=1e-6, far=5e-6, per_node=8,
)  # fmt: skip
"""NVIDIA's H100 SXM: dense bf16, NVLink 4, and 400 Gb/s of InfiniBand for every GPU, by their data sheets.

The rest is assumed. `efficiency` is what others have published, not what megachat was measured to reach:
nanochat's depths 18 and 24 on eight H100, and a little less than KempnerForge's 0.578 for 7 B on one H200;
nobody's figure stands behind that of a width of 768.
"""


@dataclass(frozen=True, slots=True)
class Step:
    """The seconds of one optimizer step, and what they come to."""

    products: float
    """Of the model, with all that is computed again."""
    tensor: float
    """Waiting for ranks that share a model or a row."""
    data: float
    """Waiting for data-parallel ranks, but for what is hidden."""
    hidden: float
    """Sent while the products go on."""
    mfu: float
    """Model FLOPs utilisation: the model's own FLOPs, nothing counted twice, for the peak of all GPUs."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.products + self.tensor + self.data


def step(config: GPTConfig, vocab: int, layout: Layout, cluster: Cluster) -> Step:
    """One step of this layout on this cluster."""
    speed = cluster.peak * efficiency(config.dim, cluster)
    products = layout.micro_batches * _flops(config, vocab, layout) / speed
    tensor = data = hidden = 0.0
    for sent in volume(config, vocab, layout):
        seconds = wait(sent, layout, cluster)
        if sent.axis != "data":
            tensor += seconds
        elif layout.zero == 3 or (layout.zero == 2 and sent.what == "gradients"):
            hidden += seconds
        else:
            data += seconds
    room = products if layout.zero == 3 else products * 2 / 3
    data += max(0.0, hidden - room)
    own = layout.tokens * flops_per_token(config, vocab, layout.seq)
    mfu = own / (layout.gpus * cluster.peak * (products + tensor + data))
    return Step(products, tensor, data, min(hidden, room), mfu)


def efficiency(dim: int, cluster: Cluster) -> float:
    """Between two widths that are listed in proportion to the logarithm; beyond them as at the nearest."""
    widths = sorted(cluster.efficiency)
    above = bisect_left(widths, dim)
    if above in (0, len(widths)):
        return cluster.efficiency[widths[max(0, above - 1)]]
    low, high = widths[above - 1], widths[above]
    part = math.log(dim / low) / math.log(high / low)
    return cluster.efficiency[low] + part * (cluster.efficiency[high] - cluster.efficiency[low])


def wait(sent: Sent, layout: Layout, cluster: Cluster) -> float:
    """Seconds that collectives take if nothing else goes on."""
    # Ranks that share a model or a row are neighbours; those with the same weights are `tensor` apart.
    stride = layout.tensor if sent.axis == "data" else 1
    together = max(1, min(sent.ranks, cluster.per_node // stride))
    nodes = math.ceil(sent.ranks / together)
    speed = cluster.within if nodes == 1 else min(cluster.within, together * cluster.between)
    # Around the ring once; an all-reduce over nodes goes up and down a tree instead.
    far = 2 * math.ceil(math.log2(nodes)) if sent.kind == "all_reduce" else nodes - 1
    near = (together - 1) * (2 if sent.kind == "all_reduce" else nodes)
    return sent.wire / (speed * cluster.used) + sent.calls * (far * cluster.far + near * cluster.near)


def _flops(config: GPTConfig, vocab: int, layout: Layout) -> float:
    """Of one GPU in one micro-batch: its share of the blocks and of the output layer."""
    tokens = layout.micro_batch * layout.seq / layout.sequence
    work = Work(tokens, tokens * layout.seq / 2, tokens)  # as `flops_per_token` counts pairs
    blocks = Flops(config, 0, 3, "blocks" if layout.checkpointing else "none").of_hardware(work)
    return (blocks + 6 * vocab * config.dim * work.logits) / layout.tensor
