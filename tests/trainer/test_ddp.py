"""Several processes train as one would on the same global batches, and agree with one another to the last bit."""

import csv

import pytest
import several_processes
import torch
from helpers import REPRESENTATIVES
from processes import run_fresh_ranks

# What a third process changes is how much each contributes to a sum; a method of each kind sums something.
THREE = (REPRESENTATIVES.thresholds, REPRESENTATIVES.top_k, REPRESENTATIVES.moves, "SNIP", "MemoryEfficientDST")


@pytest.mark.parametrize(
    ("method", "world"),
    [*((method, 2) for method in several_processes.METHODS), *((method, 3) for method in THREE)],
)
def test_processes_train_as_one_agree_to_the_last_bit_and_log_what_holds(method, world, tmp_path):
    run_fresh_ranks(several_processes.run_all, world, tmp_path, method)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for rank in ranks:
        assert [message for message in rank["warnings"] if "sync_dist" in message or "sparse" in message] == []
    for accumulate, _ in several_processes.cases(method, world):
        first, *others = (rank[accumulate] for rank in ranks)
        for other in others:
            check_same_bits(first, other, several_processes.epochs(method))
        if method != "SWAT":  # of which each process keeps the largest activations of its own rows
            check_near(first, several_processes.train(method, accumulate))
        check_log(tmp_path / "logs" / f"{accumulate}" / "metrics.csv", first)


def check_same_bits(ours, theirs, epochs):
    """Compare two processes at the end of each epoch."""
    assert len(ours) == len(theirs) == epochs
    for one, other in zip(ours, theirs, strict=True):
        for kind, values in one.items():
            assert all(torch.equal(x, other[kind][name]) for name, x in values.items()), kind


def check_near(ours, alone):
    """Compare a process with a training that had the global batches to itself."""
    assert sum(int((~mask).sum()) for mask in alone[-1]["masks"].values()) > 0, "proves nothing"
    for one, reference in zip(ours, alone, strict=True):
        for kind, values in reference.items():
            for name, x in values.items():
                y = one[kind][name]
                near = torch.allclose(x, y, rtol=1e-5, atol=1e-8) if x.is_floating_point() else torch.equal(x, y)
                assert near, (kind, name)


def check_log(path, ends):
    """Compare the one log there is with the masks at the end of training."""
    masks = ends[-1]["masks"].values()
    rows = [row for row in csv.DictReader(path.open()) if row.get("sparsity/model")]
    assert len(rows) == len(ends)
    sparsity = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert float(rows[-1]["sparsity/model"]) == pytest.approx(sparsity, abs=1e-6)
