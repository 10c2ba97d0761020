"""DeepSpeed, in the one file that imports it: ZeRO 0-3, AutoTP, AutoEP, bf16 with fp32 master weights.

DeepSpeed's engine is a wide thing; `Engine` shows the few verbs the training loop needs, and the logical
tensors (one full tensor per parameter and optimizer moment) that a checkpoint is made of.

Facts that shaped this file (DeepSpeed 0.19.8): the first collective on a CPU compiles a shared-memory kernel
for 90 s unless told not to; ZeRO 0 in fp32 reports no gradient norm, so it is computed and clipped here; ZeRO
1-3 create optimizer state lazily, so it is created before a checkpoint is loaded; ZeRO 0 in bf16 would keep
no fp32 weights, so it runs under autocast.
"""

import contextlib
import inspect
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from shutil import which
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from megachat.config import Config
from megachat.model.blueprint import Read
from megachat.model.gpt import Block, Checkpointing
from megachat.model.moe import Experts, MoE
from megachat.parallel.fp8 import use_fp8
from megachat.parallel.mesh import Mesh
from megachat.parallel.muon import Groups, Muon, Piece, owners
from megachat.parallel.sequence import share_rows
from megachat.parallel.tensor import (
    cut_by_deepspeed,
    cut_vocabulary,
    part_of,
    partition_config,
    plan_of,
    split_axis,
    whole,
)

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import deepspeed
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import (
    groups as deepspeed_groups,
)
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_module,
)
from deepspeed.utils.tensor_fragment import fragment_address

logger.setLevel(logging.WARNING)
# A step that it throws away is for the loop to tell, which knows the batch.
logger.addFilter(lambda record: "OVERFLOW!" not in record.getMessage())
# DeepSpeed 0.19 still calls collectives by names that newer torch calls deprecated, at every step.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
# Under autocast (ZeRO 0 in bf16) norms meet fp32 weights: torch warns that it takes the slower kernel.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
# Compiling it takes a C++ compiler and 90 seconds; gloo does the same work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True)
class Parts:
    """The ranks that each hold a part of what is cut: tensor-parallel ones, or expert-parallel ones."""

    group: Any
    rank: int
    """This one's place among them."""
    ranks: int


EXPERTS = {
    "moe_layer_pattern": r"(trunk\.)?blocks\.\d+\.mlp",
    "router_pattern": "router",
    "expert_pattern": "experts",
    "expert_w1": "gate",
    "expert_w2": "down",
    "expert_w3": "up",
    "score_func": "softmax",
    "score_apply": "post",
    "route_norm": True,
    "expert_activation": "swiglu",
}
"""What AutoEP must know to put its layer in the place of `megachat.model.moe.MoE` and compute the same."""
RENAMED = {
    ".mlp.router.gate.": ".mlp.router.",
    ".mlp.experts.w1": ".mlp.experts.gate",
    ".mlp.experts.w2": ".mlp.experts.down",
    ".mlp.experts.w3": ".mlp.experts.up",
}
"""In which the parameters have these names."""

PLAIN_CLASSES = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
"""DeepSpeed's own classes in its checkpoints: they hold values, and unpickling them runs nothing else."""


class Parallel(Config):
    """How a model is spread over processes and in which precision it computes."""

    zero: Literal[0, 1, 2, 3]
    """ZeRO stage: 1 shards optimizer state over the data ranks, 2 also gradients, 3 also parameters
    (Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054)."""
    tensor: PositiveInt
    """Tensor-parallel degree: how many neighbouring ranks share one copy of the model's matrices."""
    sequence: PositiveInt
    """Sequence-parallel degree: how many neighbouring ranks share the tokens of each row (DeepSpeed-Ulysses,
    https://arxiv.org/abs/2309.14509). It divides `model.kv_heads` and `context`; not with `tensor`."""
    expert: PositiveInt
    """Expert-parallel degree: how many neighbouring data ranks share one copy of the experts (`model.moe`),
    and send each other the tokens that are for them."""
    precision: Literal["auto", "bf16", "fp32"]
    """`bf16` keeps fp32 master weights; `auto` is bf16 where the hardware has it, else fp32."""
    checkpointing: Checkpointing
    """What blocks compute again in the backward pass. `none`: nothing; `selective`: all but the products of
    matrices and attention (half of the memory, next to no time); `full`: everything (a third more time)."""
    compile: Literal["auto"] | bool
    """Whether blocks go through torch.compile, which merges what is between two products; `auto`: on a GPU
    with Triton and a C compiler. It takes up to a minute at the start."""
    fp8: Literal["none", "tensorwise", "rowwise"]
    """Products of the blocks' matrices in FP8 by torchao, scaled by their largest number, whole or row by
    row (slower, nearer). It needs compile; where the hardware has no FP8 it is imitated, no faster."""
    offload: Literal["none", "optimizer", "parameters"]
    """What is kept in the host's memory instead of the GPU's (Rajbhandari et al., 2021,
    https://arxiv.org/abs/2104.07857): the optimizer, which then works there (ZeRO 2 and 3), or also the
    parameters (ZeRO 3)."""
    overlap: Literal["auto"] | bool
    """Whether gradients are summed while the backward pass goes on; `auto`: on a GPU."""
    bucket: PositiveInt
    """Numbers that are sent at once: larger is faster, and takes as much memory."""
    prefetch: NonNegativeInt
    """Parameters that are gathered ahead of their layer (ZeRO 3)."""
    persistent: NonNegativeInt
    """Parameters of no more numbers stay whole on every rank (ZeRO 3)."""

    @model_validator(mode="after")
    def _consistent(self) -> "Parallel":
        if self.expert > 1 and self.tensor > 1:
            raise ValueError(f"expert={self.expert} and tensor={self.tensor}: one of them must be 1")
        if self.expert > 1 and self.offload != "none":
            raise ValueError(
                f"offload={self.offload} is not to be had with expert={self.expert}; use one of them"
            )
        least = {"none": 0, "optimizer": 2, "parameters": 3}[self.offload]
        if self.zero < least:
            raise ValueError(f"offload={self.offload} needs ZeRO {least}, not zero={self.zero}")
        if self.fp8 != "none" and self.tensor > 1:
            raise ValueError(
                f"fp8={self.fp8} is not to be had with tensor={self.tensor}: AutoTP's layers have their own "
                "products; spread the model with ZeRO 3 instead, or set fp8=none"
            )
        if self.fp8 != "none" and self.precision == "fp32":
            raise ValueError(f"fp8={self.fp8} casts from bf16; set precision=bf16, not fp32")
        if self.tensor > 1 and self.sequence > 1:
            raise ValueError(
                f"tensor={self.tensor} and sequence={self.sequence} do not go together; set one of them to 1"
            )
        if self.compile is True and self.sequence > 1:
            raise ValueError(
                f"compile=true and sequence={self.sequence} do not go together: what ranks exchange within "
                "blocks has no gradient when it is compiled; set compile=auto"
            )
        return self

    def compiled(self, device: torch.device) -> bool:
        """Whether blocks are compiled for this device."""
        if self.compile != "auto":
            return self.compile
        able = find_spec("triton") is not None and any(map(which, ("cc", "gcc", "clang")))
        return device.type == "cuda" and self.together == 1 and able

    @property
    def together(self) -> int:
        """How many ranks share a model or a row: the others read other data."""
        return self.tensor * self.sequence

    @property
    def bf16(self) -> bool:
        """Whether it computes in bf16 on this machine."""
        return self.precision == "bf16" or (self.precision == "auto" and has_bf16())


def has_bf16() -> bool:
    """Whether bf16 matrix products are native here: any recent GPU, or a CPU with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def compatible_ops() -> dict[str, bool]:
    """DeepSpeed's compiled parts, and whether this machine has what it takes to build each."""
    return {
        name: can
        for name, can in deepspeed.ops.__compatible_ops__.items()
        if name not in ("deepspeed_not_implemented", "deepspeed_shm_comm")  # the latter is set above
    }


def version() -> str:
    """DeepSpeed's."""
    return str(deepspeed.__version__)


class Engine:
    """A model in training: forward, backward, step, and its logical tensors."""

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[Groups], torch.optim.Optimizer],
        groups: Groups,
        parallel: Parallel,
        clip: float,
        mesh: Mesh,
    ) -> None:
        """`groups` are optimizer parameter groups of `model`.

        What `model` has on the meta device gets memory, as far as this rank holds it, and then waits for
        `fill` or `load_logical`. `clip` is the largest gradient norm, 0 for none.
        """
        self.mesh = mesh
        self.parallel = parallel
        self.clip = clip
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        """The full shape of every parameter, before anything is cut."""
        group_of = {
            id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]
        }
        self._group_of = {
            name: group_of[id(parameter)]
            for name, parameter in model.named_parameters()
            if id(parameter) in group_of
        }
        per_token = next((module.per_token for module in model.modules() if isinstance(module, MoE)), None)
        if per_token is not None:
            _check_experts(parallel)
        plan = plan_of(model)
        cut_vocabulary(model, plan, mesh)
        share_rows(model, mesh, partial(DistributedAttention, scatter_idx=2, gather_idx=1))
        with _quiet():
            blocks = [module for module in model.modules() if isinstance(module, Block)]
            self._prepare_blocks(blocks)
            config = self._deepspeed_config(plan, per_token)
            if any(parameter.is_meta for parameter in model.parameters()):
                self._allocate(model, blocks, plan, config)
            self._engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=groups,
                optimizer=lambda groups: build_optimizer(self._experts_apart(groups)),
                config=config,
                dist_init_required=False,
            )
        self.module: nn.Module = self._engine.module
        self._parts = Parts(mesh.tensor_group, mesh.tensor_rank, mesh.tensor)
        if parallel.expert > 1:
            group = deepspeed_groups._get_expert_parallel_group(f"ep_size_{parallel.expert}")
            self._parts = Parts(group, dist.get_rank(group), parallel.expert)
        if isinstance(self._basic_optimizer, Muon):
            if parallel.offload != "none":
                raise ValueError(
                    f"parallel.offload={parallel.offload}: Muon's ranks exchange matrices over the GPUs' "
                    "network; use optimizer=adamw, or set parallel.offload=none"
                )
            self._basic_optimizer.spread(self._pieces(), mesh)

    def _prepare_blocks(self, blocks: Sequence[Block]) -> None:
        parallel, compiled = self.parallel, self.parallel.compiled(self.mesh.device)
        for block in blocks:
            block.checkpointing = parallel.checkpointing
            if parallel.fp8 != "none":
                use_fp8(block, parallel.fp8, self.mesh.device)
            if compiled and not block.routed:
                block.compile()
            if compiled and not block.routed and parallel.zero == 3:
                set_z3_leaf_module(block, True)  # gathered whole: compiled code calls no hooks of its layers

    def _allocate(
        self, model: nn.Module, blocks: Sequence[Block], plan: Mapping[str, str], config: dict[str, Any]
    ) -> None:
        """Memory for what is on the meta device: no more at any time than this rank will hold, and a block.

        What AutoTP or AutoEP will cut is one number until then, seen as a tensor of the full shape, of which
        they copy their part.
        """
        parallel, device = self.parallel, self.mesh.device
        dtype = torch.bfloat16 if parallel.bf16 and not self._autocast else torch.float32
        later = {
            parameter
            for name, module in model.named_modules()
            if (parallel.tensor > 1 and cut_by_deepspeed(plan, name))
            or (parallel.expert > 1 and isinstance(module, Experts))
            for parameter in module.parameters(recurse=False)
        }
        sharded = parallel.zero == 3 and not later
        for part in [*blocks, model] if sharded else [model]:  # of the model what is in no block
            for parameter in part.parameters():
                if not hasattr(parameter, "ds_id"):
                    _give_memory(parameter, dtype, device, parameter in later)
            if sharded:
                deepspeed.zero.Init(module=part, config_dict_or_path=config, dtype=dtype)

    def _deepspeed_config(self, plan: Mapping[str, str], per_token: int | None) -> dict[str, Any]:
        parallel, autocast = self.parallel, self.parallel.bf16 and self.parallel.zero == 0
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # ours is in the batches; the loss is weighted by tokens
            "gradient_accumulation_steps": 1,  # the loop says where the boundary is
            "steps_per_print": 2**31,
            "zero_optimization": self._zero_config(),
            "bf16": {"enabled": parallel.bf16 and not autocast},
            "torch_autocast": {"enabled": autocast, "dtype": "bfloat16"},
            # ZeRO 0 clips by hand, below: DeepSpeed's own clipping there reports no norm.
            "gradient_clipping": self.clip if parallel.zero else 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if parallel.bf16 and not autocast:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        if parallel.tensor > 1:
            config["tensor_parallel"] = {
                "autotp_size": parallel.tensor,
                "partition_config": partition_config(plan),
            }
        if parallel.expert > 1:
            config["expert_parallel"] = {
                "enabled": True,
                "autoep_size": parallel.expert,
                "use_grouped_mm": self.mesh.device.type == "cuda",
                "top_k": per_token,
                **EXPERTS,
            }
        return config

    def _zero_config(self) -> dict[str, Any]:
        parallel, cuda = self.parallel, self.mesh.device.type == "cuda"
        config: dict[str, Any] = {
            "stage": parallel.zero,
            "overlap_comm": cuda if parallel.overlap == "auto" else parallel.overlap,
            "reduce_bucket_size": parallel.bucket,
            "allgather_bucket_size": parallel.bucket,
            "stage3_prefetch_bucket_size": parallel.prefetch,
            "stage3_param_persistence_threshold": parallel.persistent,
        }
        host = {"device": "cpu", "pin_memory": cuda}
        if parallel.offload != "none":
            config["offload_optimizer"] = host
        if parallel.offload == "parameters":
            config["offload_param"] = host
        return config

    def _experts_apart(self, groups: Groups) -> Groups:
        """The groups as DeepSpeed's ZeRO 1 and 2 want them: spread experts are in groups of their own."""
        if self.parallel.expert == 1 or self.parallel.zero not in (1, 2):
            return groups
        spread = []
        for group in groups:
            found = [parameter for parameter in group["params"] if is_moe_param(parameter)]
            group["params"] = [parameter for parameter in group["params"] if not is_moe_param(parameter)]
            if found:
                spread.append({**group, "params": found, "moe": True, "name": found[0].group_name})
        return [*groups, *spread]

    def _named(self) -> Iterator[tuple[str, Any]]:
        """Every parameter by the name that the model gave it; AutoEP's layer has other ones."""
        for name, parameter in self.module.named_parameters():
            if self.parallel.expert > 1:
                for theirs, ours in RENAMED.items():
                    name = name.replace(theirs, ours)
            yield name, parameter

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's forward pass."""
        return self._engine(*inputs, **named)

    @contextlib.contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """The module in eval mode, without gradients: to validate, and to sample from weights in training."""
        training = self.module.training
        self.module.eval()
        autocast = torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=self._autocast)
        try:
            with torch.no_grad(), autocast:
                yield self.module
        finally:
            self.module.train(training)

    @property
    def _autocast(self) -> bool:
        return self.parallel.bf16 and self.parallel.zero == 0

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of `loss`, summed over the data ranks. `last`: a step follows.

        DeepSpeed averages over data ranks, and over those that share rows, of whose loss each has computed a
        part, so the caller's sum is scaled up by their number.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.mesh.replicas, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the micro-batch, changes nothing

    def step(self, learning_rate: float) -> float:
        """Clips, takes one optimizer step, clears gradients; returns the gradient norm before clipping.

        If that is not finite, gradients are cleared and nothing else changes: weights, moments, their count.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._clip_by_hand() if self.parallel.zero == 0 else None
        if norm is not None and not math.isfinite(norm):
            self.skip()
            return norm
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
            if not math.isfinite(norm):
                self._forget()
        return norm

    def skip(self) -> None:
        """Ends a step without an update: gradients are cleared, nothing else changes. All ranks call it."""
        if self.parallel.zero == 0:
            self.module.zero_grad(set_to_none=True)  # the optimizer passes over parameters without a gradient
            self._engine.step()
            return
        # DeepSpeed throws away a step whose gradients are not finite, with all that it has gathered for it.
        for gradient in self._gradients():
            gradient.fill_(math.nan)
        self._engine.step()
        assert not math.isfinite(self._engine.get_global_grad_norm()), "DeepSpeed has taken the step"
        self._forget()

    def _forget(self) -> None:
        """DeepSpeed's ZeRO 2 in bf16, with the optimizer on the host, keeps what it has thrown away."""
        if self.parallel.offload != "none" and self.parallel.zero == 2:
            kept = self._engine.optimizer.averaged_gradients
            kept.update(dict.fromkeys(kept))

    def _gradients(self) -> list[Tensor]:
        """This rank's share of them, summed over the data ranks, between the last backward and the step.

        Those that are on the host stand there for their norms, which are what DeepSpeed looks at.
        """
        zero = self._engine.optimizer
        if self.parallel.offload != "none":
            return list(zero.norm_for_param_grads.values())
        if self.parallel.zero == 0:
            return [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        if hasattr(zero, "fp32_groups_gradient_flat_partition"):  # its ZeRO 1 in bf16
            return list(zero.fp32_groups_gradient_flat_partition)
        return [gradient for group in zero.averaged_gradients.values() for gradient in group]

    def finite_gradients(self) -> bool:
        """Whether this rank's share of the gradients is finite, before the step."""
        return _finite(self._gradients())

    def finite_weights(self) -> bool:
        """Whether the weights that this rank holds are finite."""
        return _finite([getattr(parameter, "ds_tensor", parameter) for parameter in self.module.parameters()])

    def _clip_by_hand(self) -> float:
        """The global gradient norm, counting each logical parameter once, and the clip to it."""
        uncut: list[Tensor] = []
        cut: list[Tensor] = []
        for name, parameter in self._named():
            if parameter.grad is not None:
                axis = split_axis(self.shapes[name], parameter.shape)
                (uncut if axis is None else cut).append(parameter.grad)
        gradients = uncut + cut
        each = torch.stack(torch._foreach_norm(gradients)).double().square()
        squares = torch.stack([each[: len(uncut)].sum(), each[len(uncut) :].sum()])
        if self._parts.ranks > 1:
            dist.all_reduce(squares, group=self._parts.group)
            squares[0] /= self._parts.ranks  # a gradient that is not finite must be so on all ranks
        norm = squares.sum().sqrt().item()
        if self.clip and self.clip < norm < math.inf:
            torch._foreach_mul_(gradients, self.clip / (norm + 1e-6))
        return norm

    def bits(self) -> Iterator[tuple[str, tuple[Tensor, bool]]]:
        """For each parameter that other ranks hold, too: its bits, summed as whole numbers, and whether it is
        the tensor rank's part of one. Under ZeRO 3 there are none.
        """
        if self.parallel.zero == 3:
            return
        for name, parameter in self._named():
            numbers = parameter.detach().view({2: torch.int16, 4: torch.int32}[parameter.element_size()])
            total = numbers.sum(dtype=torch.int64)
            cut = split_axis(self.shapes[name], parameter.shape) is not None
            if cut and self.parallel.expert > 1:  # of all experts, which the ranks of a group hold together
                dist.all_reduce(total, group=self._parts.group)
                cut = False
            yield name, (total, cut)

    # The logical tensors: what a checkpoint holds.

    def _moments(self, group: int) -> tuple[str, ...]:
        """The optimizer's tensors for each parameter of a group, by torch's names."""
        kind, settings = type(self._basic_optimizer), self._basic_optimizer.param_groups[group]
        if issubclass(kind, torch.optim.Adam | torch.optim.AdamW) or (kind is Muon and not settings["muon"]):
            return ("exp_avg", "exp_avg_sq")
        if issubclass(kind, torch.optim.SGD | Muon):
            return ("momentum_buffer",) if settings["momentum"] or kind is Muon else ()
        raise AssertionError(f"no table of the moments of {kind.__name__}")

    @property
    def _basic_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def logical(self) -> Iterator[tuple[str, Tensor]]:
        """Every full tensor, one at a time: `weight.<parameter>` in fp32, then `<moment>.<parameter>`.

        All ranks must iterate together. Host memory holds one tensor at a time.
        """
        self._create_state()
        return self._full(self._kinds)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every full parameter in fp32, as `logical`."""
        return self._full(lambda _: ("weight",))

    def _full(self, kinds: Callable[[str], Sequence[str]]) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named():
            full = self.shapes[name]
            axis = split_axis(full, self._local_shape(parameter))
            for kind in kinds(name):
                part = self._read(parameter, None if kind == "weight" else kind)
                joined = whole(part, axis, full[axis or 0], self._parts.group, self._parts.ranks)
                yield f"{kind}.{name}", joined

    def tensors(self) -> dict[str, torch.Size]:
        """Name and full shape of every logical tensor, in the order of `logical`."""
        return {
            f"{kind}.{name}": self.shapes[name] for name, _ in self._named() for kind in self._kinds(name)
        }

    def _kinds(self, name: str) -> tuple[str, ...]:
        """The logical tensors of a parameter: what is not trained has no moments."""
        return "weight", *(self._moments(self._group_of[name]) if name in self._group_of else ())

    @property
    def steps(self) -> int:
        """How many steps the optimizer has counted: fewer than the run where updates were skipped."""
        counts = [int(state["step"]) for state in self._basic_optimizer.state.values() if "step" in state]
        return max(counts, default=0)

    @torch.no_grad()
    def fill(self, read: Read) -> None:
        """Sets every weight, before the first step. `read` is asked for no more than this rank holds."""
        for name, parameter in self._named():
            self._write(
                parameter, None, partial(self._piece, read, f"weight.{name}", self._local_shape(parameter))
            )

    @torch.no_grad()
    def load_logical(self, read: Read, steps: int) -> None:
        """Sets every weight and moment from full tensors, whatever layout wrote them.

        `read` is asked, parameter by parameter, for no more than this rank holds.
        """
        self._create_state()
        for name, parameter in self._named():
            for kind in self._kinds(name):
                piece = partial(self._piece, read, f"{kind}.{name}", self._local_shape(parameter))
                self._write(parameter, None if kind == "weight" else kind, piece)
        for state in self._basic_optimizer.state.values():
            if "step" in state:
                state["step"].fill_(steps)  # where it is: a fused optimizer counts on the GPU

    def _local_shape(self, parameter: Tensor) -> torch.Size:
        return torch.Size(
            getattr(parameter, "ds_shape", parameter.shape)
        )  # ZeRO 3 empties the parameter itself

    def _piece(self, read: Read, name: str, local: torch.Size, start: int, count: int) -> Tensor:
        """`count` elements from `start` on of this rank's part of what is cut, flat; zeros beyond its end."""
        full = self.shapes[name.partition(".")[2]]
        axis, width = split_axis(full, local), local[1:].numel()
        end = min(start + count, local.numel())
        if end <= start:
            return torch.zeros(count, device=self.mesh.device)
        first = start // width
        index = [slice(first, -(-end // width)), *(slice(size) for size in local[1:])]
        if axis is not None:
            offset = part_of(full[axis], self._parts.rank, self._parts.ranks).start
            index[axis] = slice((index[axis].start or 0) + offset, index[axis].stop + offset)
        rows = read(name, *index).to(self.mesh.device, torch.float32).reshape(-1)
        piece = rows[start - first * width : end - first * width]
        return nn.functional.pad(piece, (0, count - len(piece)))

    def _read(self, parameter: Any, moment: str | None) -> Tensor:
        if not parameter.requires_grad:
            return self._read_frozen(parameter).float()
        if self.parallel.zero == 0:
            value = parameter if moment is None else self._basic_optimizer.state[parameter][moment]
            return value.detach().float()
        if self.parallel.zero < 3 and self.mesh.replicas == 1:  # this rank has all of it: nothing to gather
            part = parameter._hp_mapping.get_hp_fragment(moment).view_as(parameter).detach()
            return part.to(self.mesh.device)
        if moment is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, moment)

    def _read_frozen(self, parameter: Any) -> Tensor:
        """What no optimizer knows, in the precision it computes in: DeepSpeed keeps no other copy of it."""
        if self.parallel.zero < 3:
            return parameter.detach()
        own = parameter.ds_tensor.detach().to(self.mesh.device)
        group = parameter.ds_process_group
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group=group)
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)

    def _write(self, parameter: Any, moment: str | None, piece: Callable[[int, int], Tensor]) -> None:
        """Sets what this rank holds. The low-precision weight that computes does not follow the fp32 one."""
        if self.parallel.zero == 0:
            target = parameter if moment is None else self._basic_optimizer.state[parameter][moment]
            target.copy_(piece(0, target.numel()).view_as(target))
        elif self.parallel.zero == 3:
            # Cut here: DeepSpeed's own cut reads past the end where the ranks do not divide the tensor.
            count = parameter.ds_tensor.numel()
            part = piece(count * dist.get_rank(parameter.ds_process_group), count)
            if moment is not None:
                safe_set_local_optimizer_state(parameter, part, moment)
                return
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.copy_(part)
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:
                parameter.partition()  # a small one stays gathered between steps: it is gathered anew
        else:
            # None where this rank's share has nothing of the parameter, or it is not trained.
            mapping = getattr(parameter, "_hp_mapping", None)
            if moment is None:
                whole_part = piece(0, parameter.numel())
                parameter.copy_(whole_part.view_as(parameter))
                if mapping is not None:
                    where = mapping.lp_fragment_address
                    mapping.get_hp_fragment().copy_(whole_part.narrow(0, where.start, where.numel))
            elif mapping is not None:
                where = mapping.lp_fragment_address
                mapping.get_hp_fragment(moment).copy_(piece(where.start, where.numel))

    def _stepped(self) -> list[tuple[Tensor, int]]:
        """The tensors that the optimizer steps, of many parameters under ZeRO 1-3, and their groups."""
        optimizer, zero = self._basic_optimizer, self._engine.optimizer
        if self.parallel.zero == 3:  # its groups hold them during a step only
            flat = zero.fp32_partitioned_groups_flat
            return [(tensor, zero.sub_group_to_group_id[index]) for index, tensor in enumerate(flat)]
        groups = enumerate(optimizer.param_groups)
        return [(parameter, index) for index, group in groups for parameter in group["params"]]

    def _pieces(self) -> dict[Tensor, list[Piece]]:
        """Of which matrices the tensors that Muon steps have pieces."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        found = [
            (flat, parameter, *self._place(parameter))
            for index, (flat, group) in enumerate(self._stepped())
            if self._basic_optimizer.param_groups[group]["muon"]
            for parameter in self._parameters_of(flat, index)
        ]
        own = torch.tensor([count for *_, count in found], device=self.mesh.device)
        table = [own]
        if self.parallel.zero and self.mesh.replicas > 1:
            table = [torch.empty_like(own) for _ in range(self.mesh.replicas)]
            dist.all_gather(table, own, group=self.mesh.replica_group)
        counts: list[list[int]] = torch.stack(table).T.tolist()
        pieces: dict[Tensor, list[Piece]] = {}
        for (flat, parameter, start, _), held, owner in zip(found, counts, owners(counts), strict=True):
            shape = self._local_shape(parameter)
            axis = split_axis(self.shapes[names[id(parameter)]], shape)
            pieces.setdefault(flat, []).append(Piece(shape, axis, start, tuple(held), owner))
        return pieces

    def _parameters_of(self, flat: Tensor, index: int) -> Sequence[Any]:
        """Those that lie end to end in a tensor that the optimizer steps, the `index`-th."""
        zero = self._engine.optimizer
        if self.parallel.zero == 0:
            return [flat]
        if self.parallel.zero == 3:
            return zero.fp16_groups[index]
        return (zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups)[index]

    def _place(self, parameter: Any) -> tuple[int, int]:
        """Where in that tensor this rank's piece of a parameter begins, and how many numbers it has."""
        if self.parallel.zero == 0:
            return 0, parameter.numel()
        if self.parallel.zero < 3:
            mapping = parameter._hp_mapping
            if mapping is None:
                return 0, 0
            return mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        zero, size = self._engine.optimizer, parameter.partition_numel()
        left = parameter.ds_numel - size * dist.get_rank(parameter.ds_process_group)
        return zero.grad_position[zero.get_param_id(parameter)][1], max(0, min(size, left))

    def _create_state(self) -> None:
        """Gives the optimizer the state its first step would create, so that it can be read and written."""
        optimizer, zero = self._basic_optimizer, self._engine.optimizer
        for parameter, group in self._stepped():
            if optimizer.state[parameter]:
                continue
            state: dict[str, Any] = {moment: torch.zeros_like(parameter) for moment in self._moments(group)}
            if "exp_avg" in state:
                fused = optimizer.defaults.get("fused")
                state["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
            optimizer.state[parameter] = state
        if self.parallel.zero in (1, 2):
            # DeepSpeed links after the first group's first step, when the other groups have no state yet.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()


def _check_experts(parallel: Parallel) -> None:
    """Raises where a mixture of experts is not carried."""
    if parallel.compile is True:
        raise ValueError(
            "parallel.compile=true: how many tokens an expert of a mixture (model.moe) gets is not known "
            "beforehand, which torch.compile must know; set parallel.compile=false"
        )
    if parallel.fp8 != "none":
        raise ValueError(
            f"parallel.fp8={parallel.fp8} has no products for the experts of a mixture (model.moe); "
            "set parallel.fp8=none"
        )


def newton_schulz(matrix: Tensor) -> Tensor:
    """The matrix with singular values of about 1, by five Newton-Schulz iterations on its Gram matrix.

    DeepSpeed's, in fp16 on a GPU and in fp32 on a CPU; not compiled, for they are matrix products.
    """
    # Imported where it is used: its decorator imports torch's compiler, which takes seconds.
    from deepspeed.runtime.zero.muon.original_muon import zeropower_via_gram_newtonschulz

    return inspect.unwrap(zeropower_via_gram_newtonschulz)(matrix, 5).to(matrix.dtype)


def _give_memory(parameter: nn.Parameter, dtype: torch.dtype, device: torch.device, one: bool) -> None:
    """Gives a parameter memory on the device, for all of it or for `one` number; it stays the same object."""
    if not parameter.is_meta:
        memory = parameter.detach().to(device, dtype)
    elif one:
        memory = torch.zeros((), dtype=dtype, device=device).expand(parameter.shape)
    else:
        memory = torch.empty(parameter.shape, dtype=dtype, device=device)
    real = nn.Parameter(memory, parameter.requires_grad)
    real.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, real)


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all are; a GPU is waited for once, not for each."""
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed reports its set-up on several loggers and by print; none of it is for the user."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
