"""What DeepSpeed saves is read as full tensors, bit for bit; what is damaged, missing or hostile is refused.

Checkpoints are DeepSpeed's own where the layout matters, and written by hand in its format where a mistake in
them does: a (2, 3) holds 0 to 5 and b (3,) holds 6 to 8; moments are the same and 10 or 20 more.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, arange, tensor, zeros
from torch.testing import assert_close

from megachat.parallel.deepspeed_checkpoint import Source, cut, joined, open_source, owners
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import start
from megachat.train.optimizers import AdamW
from tests.payload import Payload
from tests.spawn import on_ranks
from tests.tiny_deepspeed import TINY, VOCAB, convert, deepspeed_engine, save, train
from tests.tiny_model import spread

SHAPES = OrderedDict(a=torch.Size([2, 3]), b=torch.Size([3]))
MORE = {"weight": 0, "exp_avg": 10, "exp_avg_sq": 20}
ADAM = ("exp_avg", "exp_avg_sq")


def flat(kind: str) -> Tensor:
    return arange(9.0) + MORE[kind]


def expected(kind: str) -> dict[str, Tensor]:
    return {"a": flat(kind)[:6].view(2, 3), "b": flat(kind)[6:]}


def model_states(zero: int, **other: Any) -> dict[str, Any]:
    """What `mp_rank_00_model_states.pt` holds."""
    module = expected("weight") if zero < 3 else {"a": zeros(0), "b": zeros(0)}
    return {
        "module": OrderedDict(module), "buffer_names": [], "optimizer": None,
        "param_shapes": [SHAPES] if zero else None,
        "frozen_param_shapes": None, "frozen_param_fragments": None, "shared_params": {},
        "data_sampler": None, "skipped_steps": 2, "global_steps": 5, "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": zero}},
    } | other  # fmt: skip


def write(folder: Path, zero: int) -> Path:
    """A checkpoint of step 3, over two ranks with ZeRO; returns the folder of its files.

    Its optimizer took one step more to create its state, as those of DeepSpeed's bf16 with ZeRO 0 do.
    """
    files = folder / "global_step5"
    files.mkdir(parents=True)
    gap = 2 if zero == 2 else 0  # between a and b
    (folder / "latest").write_text("global_step5")
    state = {0: {"step": tensor(4.0)} | {kind: expected(kind)["a"] for kind in ADAM}}
    state[1] = {"step": tensor(4.0)} | {kind: expected(kind)["b"] for kind in ADAM}
    optimizer = {"state": state, "param_groups": [{"params": [0, 1]}]}
    if zero < 3:
        torch.save(
            model_states(zero, optimizer=None if zero else optimizer), files / "mp_rank_00_model_states.pt"
        )
    for rank in range(2 if zero else 0):
        if zero == 3:  # a is cut 3 + 3, b 2 + 1 and a zero
            held = {
                kind: torch.cat(
                    [flat(kind)[3 * rank :][:3], torch.cat([flat(kind)[6:], zeros(1)])[2 * rank :][:2]]
                )
                for kind in MORE
            }
            torch.save(model_states(3), files / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        else:  # nine numbers and three zeros are cut 6 + 6, and the weights leave the zeros at the end out
            held = {
                kind: torch.cat([flat(kind)[:6], zeros(gap), flat(kind)[6:], zeros(3 - gap)])[6 * rank :][:6]
                for kind in MORE
            }
            held["weight"] = held["weight"][: 6 - (3 - gap) * rank]
        base = {"state": {0: {"step": tensor(4.0)} | {kind: held[kind] for kind in ADAM}}, "param_groups": []}
        if zero == 3:
            inner = {"partition_count": 2, "optimizer_state_dict": base, "fp32_flat_groups": [held["weight"]]}
        else:
            inner = {
                "partition_count": [2], "group_paddings": [(3 - gap) * rank], "base_optimizer_state": base,
                "single_partition_of_fp32_groups": [held["weight"]], "param_alignment_paddings": [[gap, 0]],
            }  # fmt: skip
        torch.save({"optimizer_state_dict": inner}, files / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return files


def write_universal(folder: Path) -> Path:
    """The same as `ds_to_universal` leaves it."""
    files = folder / "global_step5_universal"
    for name in SHAPES:
        (files / "zero" / name).mkdir(parents=True)
        for kind, file in zip(MORE, ("fp32", *ADAM), strict=True):
            torch.save({"param": expected(kind)[name]}, files / "zero" / name / f"{file}.pt")
        torch.save(tensor(4.0), files / "zero" / name / "step.pt")
    torch.save({"param_groups": []}, files / "zero" / "optimizer_state.pt")
    torch.save(model_states(1), files / "mp_rank_00_model_states.pt")
    (folder / "latest_universal").write_text(files.name)
    return files


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Rewrites a file of a checkpoint."""
    held = torch.load(path, weights_only=True)
    torch.save(edit(held) or held, path)


def check(source: Source) -> None:
    """It is what was written."""
    assert (source.step, source.optimizer_steps, source.moments) == (3, 4, ADAM)
    for kind in MORE:
        for name, value in expected(kind).items():
            assert torch.equal(source.read(name, kind, SHAPES[name]), value), f"{name} ({kind})"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_checkpoint_written_by_hand_is_read(tmp_path: Path, zero: int) -> None:
    files = write(tmp_path, zero)
    check(open_source(tmp_path, None, moments=True))  # by its `latest`
    check(open_source(tmp_path, "global_step5", moments=True))
    check(open_source(files, None, moments=True))


def test_a_universal_one_written_by_hand_is_read(tmp_path: Path) -> None:
    files = write_universal(tmp_path)
    check(open_source(tmp_path, None, moments=True))
    check(open_source(files, None, moments=True))


def test_numbers_are_cut_out_of_tensors_laid_end_to_end() -> None:
    pieces = [arange(3), arange(3, 4), arange(4, 8)]
    assert [piece.tolist() for piece in cut(pieces, 2, 4)] == [[2], [3], [4, 5]]
    assert [piece.tolist() for piece in cut(pieces, 6, 9)] == [[6, 7]]  # they end there
    assert cut(pieces, 1, 1)[0].data_ptr() == pieces[0][1:].data_ptr()  # a view: nothing is read yet


def test_slices_of_tensor_ranks_are_joined_along_the_axis_that_differs() -> None:
    halves = [zeros(2, 3), torch.ones(2, 3)]
    assert joined(halves, torch.Size([2, 3])) is halves[0]  # whole on every rank
    assert_close(joined(halves, torch.Size([4, 3])), torch.cat(halves, 0))
    assert_close(joined(halves, torch.Size([2, 6])), torch.cat(halves, 1))
    assert joined([zeros(3, 2), zeros(1, 2)], torch.Size([4, 2])) is not None  # unequal slices
    assert joined(halves, torch.Size([4, 6])) is None
    assert joined([zeros(6)], torch.Size([2, 3])) is not None
    assert joined([zeros(6)], torch.Size([2, 4])) is None


def test_zero_0_has_no_names_so_shapes_tell_whose_moments_they_are() -> None:
    names = {"a": (2, 2), "b": (2,), "frozen": (7,), "c": (2, 2), "d": (2,)}
    matrices, vectors = [(2, 2), (2, 2)], [(2,), (2,)]
    found = owners(names, [matrices, vectors])
    assert found == {"a": (0, 0), "b": (1, 0), "c": (0, 1), "d": (1, 1)}
    with pytest.raises(
        ValueError, match=r"b may be of the optimizer's groups \[0, 1\]; moments=false imports"
    ):
        owners(names, [[(2, 2), (2,)], [(2,), (2, 2)]])
    with pytest.raises(ValueError, match="not in the model's order"):
        owners(names, [[(2, 2), (2,), (7,), (2,), (2, 2)]])


def test_what_was_frozen_has_its_weight_and_moments_of_zero(tmp_path: Path) -> None:
    write(tmp_path / "one", 1)
    change(
        tmp_path / "one" / "global_step5" / "mp_rank_00_model_states.pt",
        lambda held: held["module"].update(c=torch.ones(2)),
    )
    write(tmp_path / "three", 3)
    for rank in range(2):
        change(
            tmp_path / "three" / "global_step5" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
            lambda held: held.update(
                frozen_param_shapes=OrderedDict(c=torch.Size([3])),
                frozen_param_fragments={"c": torch.ones(2)},
            ),
        )
    for name, size in (("one", 2), ("three", 3)):
        source = open_source(tmp_path / name, None, moments=True)
        check(source)
        assert source.frozen == {"c"}
        assert torch.equal(source.read("c", "weight", torch.Size([size])), torch.ones(size))
        assert torch.equal(source.read("c", "exp_avg", torch.Size([size])), zeros(size))


def test_a_tied_weight_is_known_by_both_names(tmp_path: Path) -> None:
    for name, zero, listed in (("zero", 1, {"head": "a"}), ("plain", 0, None)):

        def tie(held: Any, listed: Any = listed) -> None:
            held["module"]["head"] = held["module"]["a"]
            held["shared_params"] = listed

        change(write(tmp_path / name, zero) / "mp_rank_00_model_states.pt", tie)
        source = open_source(tmp_path / name, None, moments=True)
        check(source)
        assert (set(source.parameters), dict(source.shared)) == ({"a", "b"}, {"head": "a"})


@pytest.mark.parametrize(
    "name",
    ["model", "data_sampler", "optimizer", "fp32", "exp_avg", "step", "optimizer_state", "universal_model"],
)
def test_hidden_code_is_refused_and_does_not_run(tmp_path: Path, name: str) -> None:
    ran = tmp_path / "ran"
    universal = name in ("fp32", "exp_avg", "step", "optimizer_state", "universal_model")
    files = (write_universal if universal else lambda folder: write(folder, 1))(tmp_path)
    path = {
        "optimizer": files / "zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "fp32": files / "zero" / "a" / "fp32.pt",
        "exp_avg": files / "zero" / "b" / "exp_avg.pt",
        "step": files / "zero" / "b" / "step.pt",
        "optimizer_state": files / "zero" / "optimizer_state.pt",
    }.get(name, files / "mp_rank_00_model_states.pt")
    held = torch.load(path, weights_only=True)
    if isinstance(held, dict):
        held["data_sampler" if name == "data_sampler" else "extra"] = Payload(ran)
    else:
        held = Payload(ran)
    torch.save(held, path)
    with pytest.raises(
        ValueError, match=rf"{path.name} is refused: it asks for (posix|os)\.mkdir"
    ) as refused:
        check(open_source(tmp_path, None, moments=True))
    assert "nothing was run" in str(refused.value)
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists(), "the payload is none"


def _drop(held: Any, *keys: Any) -> None:
    for key in keys[:-1]:
        held = held[key]
    del held[keys[-1]]


def _short(held: Any) -> None:
    groups = held["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[0] = groups[0][:-1]


def _long(held: Any) -> None:
    groups = held["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[0] = torch.cat([groups[0], zeros(1)])


def _short3(held: Any) -> None:
    groups = held["optimizer_state_dict"]["fp32_flat_groups"]
    groups[0] = groups[0][:-1]


def _later(held: Any) -> None:
    held["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] += 1


FUSED = {"parameter_with_sub_params": [{"patterns": ["qkv"]}]}
SECOND = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize(
    ("zero", "file", "edit", "message"),
    [
        (1, SECOND, _short, r"b \(weight\) has 2 of its 3 numbers"),
        (1, SECOND, _long, r"group 0 \(weight\) has 10 numbers, its parameters 9"),
        (3, SECOND, _short3, r"a rank has 4 numbers \(weight\), its parameters 5"),
        (1, SECOND, _later, r"its parts are of steps \[4, 5\]; it was not saved whole"),
        (
            1,
            "mp_rank_00_model_states.pt",
            lambda held: held.update(universal_checkpoint_info=FUSED),
            r"cut fused parameters \(qkv\); convert it with .*ds_to_universal",
        ),
        (
            1,
            "mp_rank_00_model_states.pt",
            lambda held: held.update(mp_world_size=2),
            "has the states of 1 of 2 tensor ranks; copy the whole folder",
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_add_up_is_refused(
    tmp_path: Path, zero: int, file: str, edit: Callable[[Any], Any], message: str
) -> None:
    change(write(tmp_path, zero) / file, edit)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, None, moments=True)


@pytest.mark.parametrize(
    ("zero", "file", "message"),
    [
        (1, SECOND, "has 1 of 2 parts of the optimizer's state; copy the whole folder"),
        (3, "zero_pp_rank_0_mp_rank_00_optim_states.pt", "but not that of the rank before it"),
        (2, "mp_rank_00_model_states.pt", "it is no checkpoint of DeepSpeed's"),
        (3, "zero_pp_rank_0_mp_rank_00_model_states.pt", "but not that of the rank before it"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, zero: int, file: str, message: str) -> None:
    (write(tmp_path, zero) / file).unlink()
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, None, moments=True)


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 1) / SECOND
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{SECOND} cannot be read, it is damaged"):
        open_source(tmp_path, None, moments=True)


def test_the_weights_alone_need_no_optimizer(tmp_path: Path) -> None:
    files = write(tmp_path, 1)
    for rank in range(2):
        (files / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(
        ValueError, match=r"no optimizer states .* or import the weights alone: moments=false"
    ):
        open_source(tmp_path, None, moments=True)
    source = open_source(tmp_path, None, moments=False)
    assert source.moments == ()
    assert torch.equal(source.read("a", "weight", SHAPES["a"]), expected("weight")["a"])


def test_a_folder_that_holds_no_checkpoint_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        open_source(tmp_path / "nowhere", None, moments=True)
    write(tmp_path, 1)
    (tmp_path / "latest").unlink()
    with pytest.raises(ValueError, match=r"no `latest` that names one; give tag=\.\.\., one of global_step5"):
        open_source(tmp_path, None, moments=True)
    for tag in ("global_step6", "../elsewhere"):
        with pytest.raises(ValueError, match=f"holds no checkpoint '{tag}'; give tag=..., or the folder"):
            open_source(tmp_path, tag, moments=True)


def test_another_shape_is_told_with_both(tmp_path: Path) -> None:
    write(tmp_path, 1)
    source = open_source(tmp_path, None, moments=True)
    with pytest.raises(ValueError, match=r"a \(weight\) is \(2, 3\) there and \(2, 4\) in this model"):
        source.read("a", "weight", torch.Size([2, 4]))


# DeepSpeed's own.


def held(engine: Any) -> dict[str, Tensor]:
    """What the engine trains with, by DeepSpeed's own words. Not under ZeRO 0 or tensor parallelism."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # It links after the first group's first step, when the second group has no state yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            found[f"weight {name}"] = safe_get_full_fp32_param(parameter)
            for moment in ADAM:
                found[f"{moment} {name}"] = safe_get_full_optimizer_state(parameter, moment)
    return found


def shapes() -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in TINY.build(VOCAB).named_parameters()}


ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
BF16 = {"bf16": {"enabled": True}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": ZERO3},
        {"zero_optimization": ZERO3 | {"sub_group_size": 700}},
        {"zero_optimization": {"stage": 1}} | BF16,
        {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}} | BF16,
        {"zero_optimization": ZERO3} | BF16,
    ],
    ids=str,
)
@on_ranks(2)
def test_two_ranks_of_deepspeed_are_read_bit_for_bit(tmp_path: Path, config: dict[str, Any]) -> None:
    mesh = start(1)
    engine = deepspeed_engine(config)
    train(engine, range(3), mesh.data_rank)
    tensors = held(engine)
    save(engine, tmp_path / "own")
    mesh.barrier()
    source = open_source(tmp_path / "own", None, moments=True)
    assert source.step == 3
    sources = [source]
    if "data_types" not in config:  # the converter asks BF16_Optimizer for a stage that it does not write
        if mesh.rank == 0:
            convert(tmp_path / "own")
        mesh.barrier()
        sources.append(open_source(tmp_path / "universal", None, moments=True))
    for source in sources:
        assert set(source.parameters) == set(shapes())
        for name, shape in shapes().items():
            for kind in MORE:
                found = source.read(name, kind, shape)
                assert torch.equal(found, tensors[f"{kind} {name}"].view(shape)), (
                    f"{source.path} {kind} {name}"
                )


@pytest.mark.slow
@on_ranks(2)
def test_of_deepspeeds_muon_the_weights_alone_are_read(tmp_path: Path) -> None:
    import torch._dynamo
    from deepspeed.utils import safe_get_full_fp32_param

    torch._dynamo.config.disable = True  # it would compile each shape
    mesh = start(1)
    for zero in (0, 1, 2, 3):
        stage = {"zero_optimization": {"stage": zero, "reduce_scatter": False}}
        muon = {"type": "Muon", "params": {"lr": 1e-2, "torch_adam": True}}
        engine = deepspeed_engine({"optimizer": muon} | stage)
        train(engine, range(3), mesh.data_rank)
        path = tmp_path / str(zero)
        save(engine, path)
        mesh.barrier()
        with pytest.raises(
            ValueError, match="DeepSpeed's Muon, whose momentum cannot be imported; moments=false"
        ):
            open_source(path, None, moments=True)
        source = open_source(path, None, moments=False)
        assert (source.step, source.moments) == (3, ())
        for name, parameter in engine.module.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            whole = parameter if zero < 3 else safe_get_full_fp32_param(parameter)
            assert torch.equal(source.read(name, "weight", shape), whole), (zero, name)


@pytest.mark.slow
@on_ranks(2)
def test_parameters_dealt_round_robin_are_read_in_that_order(tmp_path: Path) -> None:
    # DeepSpeed 0.19's own accessors, and so ds_to_universal, mistake one parameter for another here.
    mesh = start(1)
    engine = deepspeed_engine({"zero_optimization": {"stage": 2, "round_robin_gradients": True}})
    train(engine, range(3), mesh.data_rank)
    save(engine, tmp_path)
    mesh.barrier()
    source = open_source(tmp_path, None, moments=True)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(source.read(name, "weight", parameter.shape), parameter), name


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
@on_ranks(2)
def test_a_frozen_parameter_of_deepspeeds_comes_along(tmp_path: Path, zero: int) -> None:
    mesh = start(1)
    engine = deepspeed_engine({"zero_optimization": ZERO3 if zero == 3 else {"stage": zero}}, frozen=True)
    train(engine, range(2), mesh.data_rank)
    tensors = held(engine)
    save(engine, tmp_path)
    mesh.barrier()
    source = open_source(tmp_path, None, moments=True)
    assert source.frozen == {"norm.weight"}
    for name, shape in shapes().items():
        expected = torch.ones(shape) if name in source.frozen else tensors[f"weight {name}"]
        assert torch.equal(source.read(name, "weight", shape), expected), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["0 2 fp32", "1 2 fp32", "3 2 fp32", "1 2 bf16", "0 1 fp32"])
@on_ranks(2)
def test_tensor_parallel_ranks_are_read_bit_for_bit(tmp_path: Path, layout: str) -> None:
    zero, tensor, precision = layout.split()
    mesh = start(int(tensor))
    torch.manual_seed(0)
    model = TINY.build(VOCAB)
    settings = AdamW(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    parallel = spread(zero=int(zero), tensor=mesh.tensor, precision=precision)
    engine = Engine(model, settings.build, settings.groups(model), parallel, 0.0, mesh)
    train(engine._engine, range(3), mesh.data_rank)
    save(engine._engine, tmp_path)
    logical = dict(engine.logical())
    mesh.barrier()
    source = open_source(tmp_path, None, moments=True)
    for name, shape in shapes().items():
        for kind in MORE:
            assert torch.equal(source.read(name, kind, shape), logical[f"{kind}.{name}"]), f"{kind}.{name}"
