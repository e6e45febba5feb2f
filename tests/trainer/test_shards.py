"""Weights whose rows FSDP2 divides over processes, on CPU with gloo: masks are those of one process."""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import N_OF_M, ROUNDS, SETTINGS
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import run_fresh_ranks
from shards_ranks import (
    GRID,
    METHODS,
    MONITORED,
    RESUMED,
    Divided,
    looped,
    run_all,
    run_killed,
    run_resumed,
    train,
    watched,
)
from torch.distributed._tensor import Partial, Replicate, Shard

from lightning_sparse import SET, MemoryEfficientDST
from lightning_sparse.compat.shards import Layout
from lightning_sparse.trainer.guards import refuse_trainer
from lightning_sparse.trainer.mask_files import read_masks
from lightning_sparse.trainer.shards import unfit_layout

pytestmark = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "fully_shard"), reason="FSDP2 is public since torch 2.6"
)
THREE = (  # of each way to choose one
    *("RigL, AdamW", "GGR", "DeepR", "MemoryEfficientDST"),
    *("DFBST, AdamW, accumulated", "STR", "DST, sparsity", "TopKAST", "LotteryTicket"),
    *("RigL, 3:4, AdamW", "MEST, rows", "GGR, blocks"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What two processes have trained, and three."""
    folder = tmp_path_factory.mktemp("shards")
    run_fresh_ranks(run_all, 2, folder, [*METHODS])
    run_fresh_ranks(run_all, 3, folder, THREE)
    run_fresh_ranks(run_all, 4, folder, [*GRID])
    results = {world: torch.load(folder / f"{world}.pt") for world in (2, 3, 4)}
    return {**results, "file": folder / "masks.safetensors"}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The folder of a training that two processes began, three went on with, and one has ended."""
    folder, before = tmp_path_factory.mktemp("resumed"), 0
    for epoch, world in enumerate((2, 3, 1)):
        run_fresh_ranks(run_resumed, world, folder, before, epoch)
        before = world
    return folder


@functools.cache
def alone(method):
    """What one process that holds all trains."""
    return train(method)


def assert_same(found, expected):
    if expected["seen"] and found["seen"]:
        (records, levels), (others, other_levels) = found["seen"], expected["seen"]
        assert records == others
        assert levels == pytest.approx(other_levels)
    assert found["counts"] == expected["counts"]
    assert found["metrics"] == pytest.approx(expected["metrics"])
    for name, mask in expected["masks"].items():
        assert torch.equal(found["masks"][name], mask), name
        assert not found["parameters"][name][~mask].any(), name
    for kind in ("parameters", "latents", "thresholds", "moments"):
        for name, expects in expected[kind].items():
            assert torch.allclose(found[kind][name], expects, rtol=0, atol=1e-12), (kind, name)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_does(trained, method):
    expected = alone(method)
    assert_same(trained[2][method], expected)
    if method in THREE:
        assert_same(trained[3][method], expected)


@pytest.mark.parametrize("method", GRID)
def test_four_processes_train_what_one_does(trained, method):
    assert_same(trained[4][method], alone(method))


def test_the_first_process_writes_what_a_monitor_has_seen(trained):
    results = [(name, trained[2][name]) for name in METHODS] + [(name, trained[4][name]) for name in GRID]
    assert {name for name, found in results if found["seen"]} == MONITORED


def test_a_dense_run_is_watched_without_its_operations(trained):
    (found, told), (expected, _) = trained[2]["watched"], watched(0, 0)
    assert found["masks"] == expected["masks"]
    ((record,), (other,)) = found["epochs"], expected["epochs"]
    assert record["layers"] == other["layers"]
    assert record["inference_flops"] is record["training_flops"] is None
    assert other["inference_flops"] == 1
    assert re.search("counts no operations .* leaves inference_flops and training_flops out", told[0])
    assert record["bytes"]["weights"] == 8 * (9 * 13 + 4 * 18 + 8)  # of the process that has most


@pytest.mark.parametrize("way", ["looped", "looped, in two"])
def test_a_loop_of_its_own_trains_the_same_bits_as_a_trainer(trained, way):
    in_trainer = trained[2]["RigL, AdamW"]
    for name, parameter in trained[2][way]["parameters"].items():
        assert torch.equal(parameter, in_trainer["parameters"][name])
    assert_same(trained[2][way], in_trainer)


def test_a_loop_of_fabric_trains_the_same_bits(trained):
    one, found = looped(0, 0, dtype=torch.float32), trained[2]["with Fabric"]
    for name, parameter in trained[2]["in float32"]["parameters"].items():
        assert torch.equal(found["parameters"][name], parameter)
        assert torch.allclose(one["parameters"][name], parameter, atol=1e-4)
    assert all(torch.equal(found["masks"][name], mask) for name, mask in one["masks"].items())


def test_a_loop_of_its_own_refuses_latent_weights(trained):
    assert re.search(
        "0.weight sparse: it is a DTensor, which .* with a Trainer only. .*RigL", trained[2]["loop refused"]
    )


@pytest.mark.parametrize("full", [True, False], ids=["full", "distributed"])
@pytest.mark.parametrize("method", RESUMED)
def test_a_run_goes_on_in_other_numbers_of_processes(resumed, method, full):
    found = torch.load(resumed / "resumed-1.pt")[method, full]
    assert_same(found, alone(method))


@pytest.mark.parametrize("method", RESUMED)
def test_one_process_that_holds_all_goes_on_from_a_full_checkpoint(resumed, method):
    assert_same(train(method, resumes=resumed / f"{method}-True-2.ckpt"), alone(method))


def test_a_full_checkpoint_is_a_plain_module(resumed):
    path = resumed / "SNFS-True-2.ckpt"
    mask = torch.load(path, weights_only=True)["callbacks"].popitem()[1]["weights"]["net.0.weight"]["mask"]
    weight = Divided.load_from_checkpoint(path).net[0].weight
    assert mask.shape == weight.shape
    assert not weight[~mask].any()


def test_a_distributed_checkpoint_keeps_masks_by_shards(resumed):
    state = torch.load(resumed / "SNFS-False-2.ckpt" / "meta.pt", weights_only=True)["callbacks"].popitem()[1]
    assert state["weights"]["net.0.weight"] == {"buffers": {}}


@pytest.mark.parametrize("method", ["TopKAST", "SNFS"])
def test_a_consolidated_checkpoint_says_what_to_do(resumed, tmp_path, method):
    path = tmp_path / "consolidated"
    torch.save(_load_distributed_checkpoint(resumed / f"{method}-False-2.ckpt"), path)
    with pytest.raises(MisconfigurationException, match=r"has made it of a folder.*Give ckpt_path the folder"):
        train(method, resumes=path)


def test_a_consolidated_checkpoint_has_the_weights(resumed, tmp_path):
    path = tmp_path / "consolidated"
    torch.save(_load_distributed_checkpoint(resumed / "SNFS-False-2.ckpt"), path)
    sparse = Divided.load_from_checkpoint(path, strict=False).net[0].weight
    whole = Divided.load_from_checkpoint(resumed / "SNFS-True-2.ckpt").net[0].weight
    assert torch.equal(sparse, whole)


@pytest.mark.parametrize("method", ["RigL", "plain"])
def test_a_process_that_is_killed_ends_the_others(tmp_path, method):
    folder = tmp_path / method
    folder.mkdir()
    run_fresh_ranks(run_killed, 2, folder, may_die=True)
    assert "RuntimeError" in (folder / "error.txt").read_text()
    if method == "RigL":
        assert_same(train("RigL", resumes=folder / "last.ckpt"), alone("RigL"))


def test_a_second_fit_goes_on(trained):
    first, second, _ = trained[2]["again"]
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())


def test_masks_are_written_whole_and_begin_another_run(trained):
    masks = read_masks(str(trained["file"]))
    for found in trained[2]["again"][1:]:
        assert all(torch.equal(mask, masks[name]) for name, mask in found.items())


@pytest.mark.parametrize("part", ["bytes", "bytes, columns"])
def test_what_a_move_sends_does_not_grow_with_the_layer(trained, part):
    small, large = trained[2][part].values()
    assert 0 < max(large) <= 32 * 1024
    assert max(large) <= 1.5 * max(small)  # rounds that many different scores take more


@pytest.mark.parametrize(("part", "a_row"), [("bytes, drawn", 2 * 4), ("bytes, AdamW", 12)])
def test_a_row_of_divided_columns_sends_some_bytes(trained, part, a_row):
    large = trained[2][part][128]
    assert 128 * a_row < max(large) <= 32 * 1024 + 128 * a_row


def test_no_process_makes_a_whole_weight(trained):
    assert trained[2]["largest"] <= 128 * 257  # with the bias, whose gradient lies beside that of the weight


def test_a_latent_step_is_the_optimizers_to_the_last_bit(trained):
    found, expected = trained[2]["latent step"]
    assert all(torch.equal(W, expected[name]) for name, W in found.items())
    assert found.keys() == expected.keys()


def test_mixed_precision_keeps_counts(trained):
    counts, nonzero = trained[2]["mixed"]
    assert sum(counts.values()) == 66  # of 330
    assert all(nonzero[name] <= count for name, count in counts.items())


def test_identical_parts_are_named(trained):
    assert any(re.search(r"began with the same numbers: net\.0\.weight.*seed \+ self", m) for m in trained[2]["warned"])


def test_a_weight_that_is_not_divided_is_refused(trained):
    assert re.search("net.0.weight sparse: it is no DTensor.*fully_shard", trained[2]["refused"])


def test_a_plan_alone_is_refused_where_processes_have_other_batches(trained):
    assert re.search(r"net.0.weight sparse: it is divided as.*not averaged.*fully_shard", trained[4]["refused"])


@pytest.mark.parametrize(
    ("placements", "method", "remedy"),
    [
        ([Partial()], "RigL", "Only Shard and Replicate are known"),
        ([Shard(1), Shard(2)], "RigL", "Rows and one other dimension"),
        ([Replicate()], "STR", "rows are divided over all processes"),
        ([Shard(1)], "STR", "rows are divided over all processes"),
    ],
)
def test_other_ways_to_divide_are_refused(placements, method, remedy):
    mesh = SimpleNamespace(mesh=torch.arange(2 ** len(placements)), size=lambda: 2 ** len(placements))
    run = SimpleNamespace(strategy=None, world_size=mesh.size())
    assert remedy in unfit_layout(
        SETTINGS[method](), Layout(mesh, tuple(placements), torch.Size((4, 4, 4)), (16, 4, 1)), run
    )


def test_latent_weights_of_which_processes_hold_inputs_are_refused(trained):
    assert re.search("net.1.weight of FSDPConvTranspose1d is divided otherwise.*exclude", trained[2]["other rows"])


def test_rows_and_blocks_that_lie_on_several_processes_are_refused(trained):
    assert re.search("net.2.weight of Linear is divided otherwise", trained[2]["rows"])
    assert re.search("block of 2 rows on one process, .* 5 rows each of net.0.weight, no multiple", trained[2]["cut"])


# ---------------------------------------------------------------------- what is refused, and the table that says so


def test_the_guide_lists_what_trains():
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "distributed.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\].*?\| ([^|]+) \|$", guide, re.MULTILINE)
    trains = {name: build().needs_whole_weights is None for name, build in {**SETTINGS, **ROUNDS, **N_OF_M}.items()}
    assert {name: text.startswith("yes") for name, text in rows} == trains


@pytest.mark.parametrize(
    ("callback", "remedy"),
    [
        (SETTINGS["AutoSparse"](backward_density=0.5), "Leave backward_density out"),
        (N_OF_M["SRSTE"](transposable=True), "Leave transposable out"),
        (SETTINGS["SNIP"](), r"save_masks.*FixedMask\(initial=path\)"),
        (SETTINGS["CHT"](), "Use SET or RigL"),
        (SET(0.8, storage="sparse"), "storage='masked', got 'sparse'"),
        (MemoryEfficientDST(0.8, heuristic="synflow"), 'heuristic="grabo"'),
    ],
)
def test_methods_that_need_whole_weights_are_refused(callback, remedy):
    run = SimpleNamespace(strategy=ModelParallelStrategy(), optimizers=[])
    message = f"needs whole weights on every process; ModelParallelStrategy may split them.*{remedy}"
    with pytest.raises(MisconfigurationException, match=message):
        refuse_trainer(callback, run)
