"""MaskedAllreduce: the same training with smaller messages."""

import allreduce_ranks
import pytest
import torch
from helpers import Lit, fit, loader, same, trainer
from processes import run_fresh_ranks

from lightning_sparse import MaskedAllreduce, RigL
from lightning_sparse.compat.lightning import MisconfigurationException

PARAMETERS = sum(p.numel() for p in allreduce_ranks.wide().parameters())
WEIGHTS = sum(p.numel() for p in allreduce_ranks.wide().parameters() if p.ndim == 2)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_train_the_same_with_less_to_send(world, tmp_path):
    run_fresh_ranks(allreduce_ranks.run_all, world, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for method in allreduce_ranks.METHODS:
        plain, masked, sent = ranks[0][method]
        assert all(same(masked, rank[method][1]) for rank in ranks)
        assert plain.keys() == masked.keys()
        near = (torch.allclose(x.double(), masked[name].double(), rtol=1e-9) for name, x in plain.items())
        assert all(near)
        assert world > 2 or same(plain, masked)  # a sum of two has one order
        if method in ("SNFS", "DST"):
            assert sent == [0] * len(sent)  # DDP's own way
        else:
            steps = sent[1::2]  # of two batches, the second sends
            assert sent[::2] == [0] * len(steps)
            assert max(steps) == PARAMETERS  # when connections move
            assert min(steps) <= 0.2 * WEIGHTS + PARAMETERS - WEIGHTS or method == "GMP"  # which begins dense
    moved = [step for step, n in enumerate(ranks[0]["RigL"][2][1::2]) if n == PARAMETERS]
    assert moved == [7, 14, 21][: len(moved)]


def test_one_process_needs_none_and_no_method_is_an_error():
    fit([RigL(0.8, update_every=7), beside := MaskedAllreduce()])
    assert beside.elements == 0
    with pytest.raises(MisconfigurationException, match="but the Trainer has none"):
        trainer([MaskedAllreduce()]).fit(Lit(), loader())
