"""What DeepSpeed saved, as logical tensors: its own checkpoints (ZeRO 0 to 3, AutoTP) and universal ones.

How its own lie on disk (`engine.save_checkpoint`, DeepSpeed 0.19): one file of module states for each
tensor-parallel rank, and, with ZeRO, one of optimizer states for each rank. ZeRO 1 and 2 lay a group's
parameters end to end and cut the whole into as many parts as there are data ranks; ZeRO 3 cuts every
parameter, padded to a multiple of the ranks, and lays a rank's parts end to end. The names are in the module
states' `param_shapes` alone, in the order of the numbers. Universal ones have a folder for each parameter.

Files are mapped and read one parameter at a time. Nothing in them is ever run: they are unpickled with
`weights_only=True`, and of classes with the four alone that DeepSpeed itself puts into every checkpoint.
"""

import pickle
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megachat.parallel.engine import PLAIN_CLASSES

WEIGHT = "weight"
"""The kind of tensor that is not a moment, as in our own checkpoints."""
MUON = {"exp_avg", "momentum_buffer"}
"""What its optimizer remembers: the one of some parameters and the other of others."""
REMEDY = "convert it with `python -m deepspeed.checkpoint.ds_to_universal` and import what that writes"

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_OTHER = re.compile(r"layer_.*model_states\.pt|.*expp_rank_.*\.pt")

State = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Somebody's checkpoint. Nothing but names and shapes has been read."""

    path: Path
    step: int
    """Steps of the training."""
    optimizer_steps: int
    """How many of them the optimizer has counted, or with those that DeepSpeed takes to create its state."""
    moments: tuple[str, ...]
    """The optimizer's tensors, by torch's names."""
    parameters: Mapping[str, Callable[[str], list[Tensor]]]
    """By its name there: from `weight` or a moment to what each tensor-parallel rank holds of it."""
    frozen: frozenset[str] = frozenset()
    """Parameters that were not trained, and have no moments."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Second names of parameters, with their first."""

    def read(self, name: str, kind: str, shape: torch.Size) -> Tensor:
        """A full tensor in fp32."""
        if kind != WEIGHT and name in self.frozen:
            return torch.zeros(shape)
        parts = self.parameters[name](kind)
        whole = joined(parts, shape)
        if whole is None:
            held = " and ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(
                f"{self.path}: {name} ({kind}) is {held} there and {tuple(shape)} in this model; "
                "give the model's own settings (and its tokenizer, which decides the vocabulary)"
            )
        return whole.float()


def joined(parts: Sequence[Tensor], shape: torch.Size) -> Tensor | None:
    """The tensor of this shape that every tensor-parallel rank holds whole, or a slice of; None if none is.

    Example: of two (16, 8), (16, 8) is the first, (32, 8) both, (16, 16) both side by side.
    """
    first = parts[0]
    if len(parts) == 1 and first.ndim == 1 and first.numel() == prod(shape):
        return first.view(shape)  # ds_to_universal leaves what it merged from ZeRO 3 flat
    if all(part.shape == shape for part in parts):
        return first
    if any(part.ndim != len(shape) for part in parts):
        return None
    for axis in range(len(shape)):
        if [*shape] == [
            *first.shape[:axis],
            sum(part.shape[axis] for part in parts),
            *first.shape[axis + 1 :],
        ]:
            return torch.cat(list(parts), axis)
    return None


def open_source(path: Path, tag: str | None, moments: bool) -> Source:
    """The checkpoint in a folder, or the one of its checkpoints that `tag` or `latest` names.

    Without `moments` optimizer states are not looked at, and need not be there.
    """
    folder = _tagged(path, tag)
    if (folder / "zero").is_dir():
        return _universal(folder, moments)
    return _own(folder, moments)


def load(path: Path) -> Any:
    """What a file of theirs holds, tensors mapped; ValueError for one that would run code, or is damaged."""
    try:
        with torch.serialization.safe_globals(list(PLAIN_CLASSES)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {found[1]}" if found else str(error).splitlines()[0]
        raise ValueError(
            f"{path} is refused: {what}, and a checkpoint is tensors and plain values; nothing was run. "
            "If that is an object you saved yourself (client_state), save the checkpoint again without it"
        ) from None
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} cannot be read, it is damaged: {str(error).splitlines()[0]}") from None


def _tagged(path: Path, tag: str | None) -> Path:
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; give the one that DeepSpeed's save_checkpoint wrote to")
    named = [path / name for name in ("latest", "latest_universal") if (path / name).is_file()]
    if tag is None and any(
        (path / "zero").iterdir() if (path / "zero").is_dir() else path.glob("*mp_rank_*")
    ):
        return path
    if tag is None and not named:
        found = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        raise ValueError(
            f"{path} holds no checkpoint of DeepSpeed, and no `latest` that names one; "
            + (f"give tag=..., one of {', '.join(found)}" if found else "give its folder")
        )
    tag = named[0].read_text(encoding="utf-8").strip() if tag is None else tag
    if Path(tag).name != tag or not (path / tag).is_dir():
        raise ValueError(f"{path} holds no checkpoint {tag!r}; give tag=..., or the folder itself")
    return path / tag


# DeepSpeed's own checkpoints.


@dataclass(frozen=True)
class _Part:
    """What one tensor-parallel rank holds of a parameter: pieces of flat tensors, mapped and not yet read."""

    shape: torch.Size
    pieces: dict[str, list[Tensor]]
    """By kind. One that was not trained has its weight alone."""

    def tensor(self, kind: str) -> Tensor:
        return torch.cat([piece.flatten() for piece in self.pieces[kind]]).view(self.shape)


Parts = dict[str, _Part]


def _own(folder: Path, moments: bool) -> Source:
    models, shards = _files(folder)
    steps: set[int] = set()
    counted: set[int] = set()
    ranks: list[Parts] = []
    for rank, paths in models.items():
        states = [load(path) for path in paths]
        state = states[0]
        stage = int(state["ds_config"].get("zero_optimization", {}).get("stage", 0))
        if (state.get("mp_world_size") or 1) != len(models):
            raise ValueError(
                f"{folder} has the states of {len(models)} of {state['mp_world_size']} tensor ranks; "
                "copy the whole folder"
            )
        _refuse_fused(folder, state)
        if stage == 0:
            inner = _inner(state["optimizer"] or {})
            _leave_muon(folder, [inner], moments)
            parts, taken = _zero0(folder, state, moments), _steps(inner)
        elif rank in shards:
            optimizers = _optimizers(folder, shards[rank])
            _leave_muon(folder, [_base(one) for one in optimizers], moments)
            parts = (_zero3 if stage == 3 else _zero12)(folder, state["param_shapes"], optimizers)
            parts |= {name: part for name, part in _untrained(states).items() if name not in parts}
            taken = set().union(*(_steps(_base(one)) for one in optimizers))
        elif stage < 3 and not moments:
            parts, taken = _module(state), set()
        else:
            raise ValueError(
                f"{folder} has no optimizer states (*_optim_states.pt), which hold the weights and moments; "
                "copy the whole folder"
                + ("" if stage == 3 else ", or import the weights alone: moments=false")
            )
        if ranks and parts.keys() != ranks[0].keys():
            other = sorted(parts.keys() ^ ranks[0].keys())
            raise ValueError(f"{folder}: not every tensor-parallel rank holds {other[0]}; {REMEDY}")
        ranks.append(parts)
        steps.add(_step(state))
        counted |= taken
    for found in (steps, counted):
        if len(found) > 1:
            raise ValueError(f"{folder}: its parts are of steps {sorted(found)}; it was not saved whole")
    kinds = {kind for parts in ranks for part in parts.values() for kind in part.pieces if kind != WEIGHT}
    named = _imported(folder, kinds, moments)
    (step,) = steps
    return Source(
        folder,
        step,
        counted.pop() if counted else step,
        named,
        {name: partial(_tensors, [parts[name] for parts in ranks]) for name in ranks[0]},
        frozenset(name for name, part in ranks[0].items() if len(part.pieces) == 1),
        _shared(state),
    )


def _leave_muon(folder: Path, states: Sequence[State], wanted: bool) -> None:
    """Takes what DeepSpeed's Muon remembers out of the states, where it is not wanted."""
    kinds = {kind for state in states for one in state.get("state", {}).values() for kind in one}
    if wanted:
        _refuse_muon(folder, kinds)
    elif kinds >= MUON:
        for state in states:
            for one in state["state"].values():
                one.clear()
            state["state"].clear()


def _refuse_muon(folder: Path, kinds: Collection[str]) -> None:
    """Its ranks have whole matrices' momentum in ZeRO 1 and 2, so that one momentum is there twice."""
    if set(kinds) >= MUON:
        raise ValueError(
            f"{folder} is of DeepSpeed's Muon, whose momentum cannot be imported; "
            "moments=false imports the weights alone"
        )


def _imported(folder: Path, kinds: Collection[str], wanted: bool) -> tuple[str, ...]:
    """The kinds of moments to import, of those that there are."""
    if wanted:
        _refuse_muon(folder, kinds)
    if wanted and not kinds:
        raise ValueError(
            f"{folder} holds no moments of an optimizer; moments=false imports the weights alone"
        )
    return tuple(sorted(kinds)) if wanted else ()


def _tensors(ranks: Sequence[_Part], kind: str) -> list[Tensor]:
    return [part.tensor(kind) for part in ranks]


def _files(folder: Path) -> tuple[dict[int, list[Path]], dict[int, list[Path]]]:
    """For each tensor-parallel rank its files of module states, and those of optimizer states."""
    models: dict[tuple[int, int], Path] = {}
    shards: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.iterdir()):
        if _OTHER.fullmatch(path.name):
            raise ValueError(f"{path}: parts of a pipeline or of experts cannot be imported; {REMEDY}")
        for grid, pattern in ((models, _MODEL), (shards, _OPTIMIZER)):
            if match := pattern.fullmatch(path.name):
                grid[int(match[2]), int(match[1] or 0)] = path
    tables: list[dict[int, list[Path]]] = []
    for grid in (models, shards):
        table: dict[int, list[Path]] = {}
        for (tensor, data), path in sorted(grid.items()):
            files = table.setdefault(tensor, [])
            if tensor != len(table) - 1 or data != len(files):
                raise ValueError(
                    f"{folder} has {path.name}, but not that of the rank before it; copy the whole folder"
                )
            files.append(path)
        tables.append(table)
    if not models:
        raise ValueError(f"{folder} has no mp_rank_00_model_states.pt: it is no checkpoint of DeepSpeed's")
    return tables[0], tables[1]


def _optimizers(folder: Path, paths: Sequence[Path]) -> list[State]:
    """The optimizer states of the data ranks."""
    states = [load(path)["optimizer_state_dict"] for path in paths]
    count = states[0].get("partition_count", len(states))
    count = max(count) if isinstance(count, list | tuple) else int(count)
    if count != len(states):
        raise ValueError(
            f"{folder} has {len(states)} of {count} parts of the optimizer's state; copy the whole folder"
        )
    return states


def _inner(optimizer: State) -> State:
    """Torch's own state dict, in what DeepSpeed has around it."""
    inner: State = optimizer.get("optimizer_state_dict", optimizer)
    return inner


def _base(optimizer: State) -> State:
    """The same of a rank's part; `elastic_checkpoint` saves a list instead."""
    base: Any = optimizer.get("base_optimizer_state", optimizer.get("optimizer_state_dict", {}))
    whole: State = {"state": dict(enumerate(base))} if isinstance(base, list) else base
    return whole


def _moments(state: State, number: int) -> dict[str, Tensor]:
    """What torch's optimizer remembers of its parameter of this number, but for the step."""
    return {
        kind: value
        for kind, value in state["state"].get(number, {}).items()
        if isinstance(value, Tensor) and kind != "step"
    }


def _steps(state: State) -> set[int]:
    """How many steps the optimizer says it has taken, if all is well: one number."""
    places = [*state.get("state", {}).values(), *state.get("param_groups", [])]
    return {int(place["step"]) for place in places if "step" in place}


def _step(state: State) -> int:
    """Of the training, from the module states. Where fp16 overflowed no step was taken."""
    return int(state["global_steps"]) - int(state["skipped_steps"])


def _refuse_fused(folder: Path, state: State) -> None:
    """Slices of a fused matrix (q, k and v in one) do not lie end to end."""
    for fused in (state.get("universal_checkpoint_info") or {}).get("parameter_with_sub_params") or []:
        names = ", ".join(map(str, fused.get("patterns", [fused]) if isinstance(fused, dict) else [fused]))
        raise ValueError(f"{folder}: tensor parallelism cut fused parameters ({names}); {REMEDY}")


def _shared(state: State) -> dict[str, str]:
    """Second names of tied weights. DeepSpeed lists them with ZeRO; without, they are one storage."""
    shared = dict(state.get("shared_params") or {})
    seen: dict[int, str] = {}
    for name, value in state["module"].items():
        if value.numel() and (first := seen.setdefault(value.data_ptr(), name)) != name:
            shared[name] = first
    return shared


def _module(state: State) -> Parts:
    """The module's own parameters, in the precision it computed in."""
    apart = {*state["buffer_names"], *_shared(state)}
    module = {name: value for name, value in state["module"].items() if name not in apart and value.numel()}
    return {name: _Part(value.shape, {WEIGHT: [value]}) for name, value in module.items()}


def _untrained(states: Sequence[State]) -> Parts:
    """Parameters that the optimizer was not given; in ZeRO 3 each rank has a piece of them."""
    if not states[0]["frozen_param_shapes"] or len(states) == 1:
        return _module(states[0])
    return {
        name: _Part(
            shape, {WEIGHT: cut([one["frozen_param_fragments"][name] for one in states], 0, prod(shape))}
        )
        for name, shape in states[0]["frozen_param_shapes"].items()
    }


def _zero0(folder: Path, state: State, moments: bool) -> Parts:
    """Whole tensors. The optimizer numbers them, so that names follow from shapes."""
    parts, optimizer = _module(state), state["optimizer"] or {}
    inner = _inner(optimizer)
    if not inner.get("state"):
        return parts
    if "fp32_groups_flat" in optimizer:
        if not moments:
            return parts
        raise ValueError(
            f"{folder} keeps fp32 weights in flat tensors without names (fp16 or bf16 with ZeRO 0); "
            "moments=false imports the weights alone"
        )
    masters = optimizer.get("fp32_groups")
    groups: list[list[dict[str, Tensor]]] = []
    for place, group in enumerate(inner["param_groups"]):
        groups.append([_moments(inner, number) for number in group["params"]])
        for index, tensors in enumerate(groups[-1]):
            if masters:
                tensors[WEIGHT] = masters[place][index]
    shapes = [[next(iter(tensors.values())).shape for tensors in group] for group in groups]
    for name, (place, index) in owners({name: part.shape for name, part in parts.items()}, shapes).items():
        parts[name].pieces.update({kind: [value] for kind, value in groups[place][index].items()})
    return parts


def owners(
    names: Mapping[str, Sequence[int]], groups: Sequence[Sequence[Sequence[int]]]
) -> dict[str, tuple[int, int]]:
    """Which parameter is which of an optimizer's, whose groups say shapes only: (group, place) by name.

    A group holds its parameters in the model's order, so a name is the next one of the group whose next one
    has its shape. Where two have, it is a ValueError.

    Example: a (2, 2), b (2,), c (2, 2) and groups [(2, 2), (2, 2)], [(2,)] -> a (0, 0), b (1, 0), c (0, 1)
    """
    remedy = "moments=false imports the weights alone"
    places = [0] * len(groups)
    found = {}
    for name, shape in names.items():
        fits = [
            group
            for group, place in enumerate(places)
            if place < len(groups[group]) and tuple(groups[group][place]) == tuple(shape)
        ]
        if len(fits) > 1:
            raise ValueError(
                f"ZeRO 0 saves no names, and {name} may be of the optimizer's groups {fits}; {remedy}"
            )
        for group in fits:
            found[name] = (group, places[group])
            places[group] += 1
    if places != [len(group) for group in groups]:
        raise ValueError(
            f"ZeRO 0 saves no names, and the optimizer's parameters are not in the model's order; {remedy}"
        )
    return found


def _zero12(folder: Path, groups: Sequence[Mapping[str, torch.Size]], ranks: Sequence[State]) -> Parts:
    """A group's parameters laid end to end, and cut over the ranks."""
    parts: Parts = {}
    for number, shapes in enumerate(groups):
        flat = {WEIGHT: [rank["single_partition_of_fp32_groups"][number] for rank in ranks]}
        for kind in _kinds(ranks, number):
            flat[kind] = [_moments(_base(rank), number)[kind] for rank in ranks]
        gaps = (ranks[0].get("param_alignment_paddings") or {number: [0] * len(shapes)})[number]
        start = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            parts[name] = _part(
                folder, name, shape, {kind: cut(flat[kind], start, prod(shape)) for kind in flat}
            )
            start += prod(shape) + gap
        padding = sum(rank["group_paddings"][number] for rank in ranks)
        # DeepSpeed leaves the padding at the end out of the weights, and not out of the moments.
        for kind, pieces in flat.items():
            count = sum(piece.numel() for piece in pieces)
            if count - start not in (0, padding):
                raise ValueError(
                    f"{folder}: group {number} ({kind}) has {count:,} numbers, its parameters {start:,}"
                )
    return parts


def _zero3(folder: Path, groups: Sequence[Mapping[str, torch.Size]], ranks: Sequence[State]) -> Parts:
    """Each parameter cut over the ranks, and a rank's parts laid end to end, in one or several tensors."""
    flat = {WEIGHT: [list(rank["fp32_flat_groups"]) for rank in ranks]}
    for kind in sorted({kind for number in range(len(flat[WEIGHT][0])) for kind in _kinds(ranks, number)}):
        flat[kind] = [
            [_moments(_base(rank), number)[kind] for number in range(len(tensors))]
            for rank, tensors in zip(ranks, flat[WEIGHT], strict=True)
        ]
    parts: Parts = {}
    start = 0
    for name, shape in ((name, shape) for shapes in groups for name, shape in shapes.items()):
        share = -(-prod(shape) // len(ranks))
        pieces = {
            kind: cut([piece for tensors in ranks_ for piece in cut(tensors, start, share)], 0, prod(shape))
            for kind, ranks_ in flat.items()
        }
        parts[name] = _part(folder, name, shape, pieces)
        start += share
    for kind, of_ranks in flat.items():
        for tensors in of_ranks:
            count = sum(tensor.numel() for tensor in tensors)
            if count != start:
                raise ValueError(f"{folder}: a rank has {count:,} numbers ({kind}), its parameters {start:,}")
    return parts


def _kinds(ranks: Sequence[State], number: int) -> list[str]:
    """The moments that every rank has of a group."""
    kinds = [set(_moments(_base(rank), number)) for rank in ranks]
    return sorted(set.intersection(*kinds))


def _part(folder: Path, name: str, shape: torch.Size, pieces: dict[str, list[Tensor]]) -> _Part:
    for kind, tensors in pieces.items():
        if (count := sum(tensor.numel() for tensor in tensors)) != prod(shape):
            raise ValueError(f"{folder}: {name} ({kind}) has {count:,} of its {prod(shape):,} numbers")
    return _Part(shape, pieces)


def cut(tensors: Sequence[Tensor], start: int, count: int) -> list[Tensor]:
    """Views of `count` numbers from `start` on in tensors laid end to end; fewer where they end sooner.

    Example: cut([tensor([1, 2]), tensor([3, 4])], 1, 2) -> [tensor([2]), tensor([3])]
    """
    found = []
    for tensor in tensors:
        flat = tensor.flatten()
        first, last = max(start, 0), min(start + count, flat.numel())
        if first < last:
            found.append(flat[first:last])
        start -= flat.numel()
    return found


# Universal checkpoints.


def _universal(folder: Path, moments: bool) -> Source:
    """A folder for each parameter, with a file for each tensor."""
    names = sorted(path.parent.name for path in (folder / "zero").glob("*/fp32.pt"))
    if not names:
        raise ValueError(f"{folder / 'zero'} holds no <parameter>/fp32.pt; {REMEDY}")
    kinds = {path.stem for name in names for path in (folder / "zero" / name).glob("*.pt")} - {"fp32", "step"}
    frozen = {
        name for name in names if not any((folder / "zero" / name / f"{kind}.pt").is_file() for kind in kinds)
    }
    named = _imported(folder, kinds, moments)
    models = sorted(path for path in folder.iterdir() if _MODEL.fullmatch(path.name))
    states = [load(path) for path in models[:1]]
    counted = {int(load(path)) for path in (folder / "zero").glob("*/step.pt")}
    optimizer = folder / "zero" / "optimizer_state.pt"
    if optimizer.is_file():
        counted |= _steps(_base(load(optimizer)))  # of ZeRO 3, which has no step.pt
    steps = {_step(state) for state in states} or counted
    if len(steps) != 1 or len(counted) > 1:
        raise ValueError(f"{folder} does not say of which step it is: {sorted(steps | counted)}; {REMEDY}")
    (step,) = steps
    return Source(
        folder,
        step,
        counted.pop() if counted else step,
        named,
        {name: partial(_of_folder, folder / "zero" / name) for name in names},
        frozenset(frozen),
        _shared(states[0]) if states else {},
    )


def _of_folder(folder: Path, kind: str) -> list[Tensor]:
    path = folder / ("fp32.pt" if kind == WEIGHT else f"{kind}.pt")
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the whole checkpoint, or convert it again")
    held = load(path)
    return [held["param"] if isinstance(held, dict) else held]
