"""Several processes with sparse layers: they train as one, agree to the last bit, and send the nonzeros alone."""

import contextlib
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import stored_ranks
import torch
from helpers import (
    Lit,
    fit,
    seeded,
)
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import run_fresh_ranks
from stored import METHODS
from torch import nn

import lightning_sparse.storage.sparse as training
from lightning_sparse import MemoryEfficientDST


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """What each process saw."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    run_fresh_ranks(stored_ranks.run_all, world, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def equal(a, b):
    return all(torch.equal(x, b[kind][name]) for kind in ("parameters", "masks") for name, x in a[kind].items())


def test_processes_train_as_one_on_the_same_global_batches_and_agree_to_the_last_bit(ranks):
    for case in [case for case in ranks[0] if isinstance(case, tuple)]:
        first, *others = (rank[case] for rank in ranks)
        assert all(equal(first, other) for other in others), case
        alone = stored_ranks.train(*case, 0, 1)
        assert all(torch.equal(mask, alone["masks"][name]) for name, mask in first["masks"].items()), case
        for name, x in first["parameters"].items():
            assert torch.allclose(x, alone["parameters"][name], rtol=0, atol=1e-12), case
        for x, y in zip(first["momentum"], alone["momentum"], strict=True):
            assert torch.allclose(x, y, rtol=0, atol=1e-12), case


def test_a_step_sends_the_nonzeros_alone(ranks):
    """Beside 30 biases, 8 bytes each; values that change their length are sent with a mark for each of 3 layers."""
    for case in [case for case in ranks[0] if isinstance(case, tuple)]:
        steps = ranks[0][case]["bytes"]
        assert len(steps) == 32 // case[1]
        sent = {"SET masked": 392, "SET": 78, "RigL": 78, "ITOP": 78, "MEST": 78, "FixedMask": 78}.get(case[0], 78 + 3)
        sent = 4 * 20 if case[0] == "blocks" else sent
        plain = [step for number, step in enumerate(steps) if number % 5 or not number]
        assert set(plain) == {8 * (sent + 30)} or case[0] == "MEST soft bound", case


def test_resume_under_ddp_is_that_of_the_uninterrupted_run(ranks):
    if "resumed" in ranks[0]:
        assert all(equal(rank["grabo", 2], rank["resumed"]) for rank in ranks)


@pytest.mark.parametrize("storage", ["masked", "sparse"])
def test_processes_keep_the_zeros_of_a_sparse_network(ranks, storage):
    if "zeros" in ranks[0]:
        first, second = (rank["zeros"][storage] for rank in ranks)
        assert equal(first, second)
        for name, nonzero in first["before"].items():
            assert torch.equal(first["parameters"][name] != 0, nonzero)
            assert torch.equal(first["masks"][name], nonzero)


def test_processes_agree_on_unused_layers_and_on_steps_to_skip(ranks):
    if "failed" in ranks[0]:
        first, second = (rank["failed"] for rank in ranks)
        assert equal(first, second)
        assert first["skipped"] == second["skipped"] == 1
        assert all(x.isfinite().all() for x in first["parameters"].values())


def test_gradients_are_averaged_also_where_some_processes_have_none(ranks):
    world = len(ranks)
    for rank in ranks:
        used, unused, partly, single = rank["averages"]
        assert used.tolist() == pytest.approx([(world + 1) / 2] * 3)
        assert unused is None
        assert partly.tolist() == pytest.approx([6 / world] * 3)
        assert single.isinf().all()


def test_ddp_must_have_a_parameter_of_its_own():
    module = Lit(nn.Linear(12, 4, bias=False))
    strategy = SimpleNamespace(world_size=2, strategy=DDPStrategy())
    with pytest.raises(MisconfigurationException, match=r"DDP needs a parameter of its own .* Give a layer"):
        MemoryEfficientDST(0.8, storage="sparse", seed=1).store._exchange(strategy, module)


@pytest.mark.parametrize("ends", ["whole", "error"])
def test_after_a_fit_ddp_has_all_parameters_again(ends, monkeypatch):
    monkeypatch.setattr(training, "DENSE_LIMIT", 0)

    class Looks(pl.Callback):
        def on_train_start(self, run, module):
            assert {"mine", "net.0.weight", "net.0.crow"} <= set(module._ddp_params_and_buffers_to_ignore)
            if ends == "error":
                raise RuntimeError("stop")

    module = seeded(Lit)
    module._ddp_params_and_buffers_to_ignore = ["mine"]
    with contextlib.suppress(RuntimeError):
        fit([METHODS["MemoryEfficientDST grabo"](storage="sparse"), Looks()], module, max_epochs=1)
    assert module._ddp_params_and_buffers_to_ignore == ["mine"]
