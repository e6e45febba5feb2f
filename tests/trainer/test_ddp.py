"""Several processes train as one would on the same global batches, and agree with one another to the last bit."""

import csv

import ddp_script
import pytest
import torch
from helpers import SETTINGS
from processes import run_ranks

WORLDS = [2, 3]


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, tmp_path_factory):
    """What each rank saw, and the folder of logs."""
    folder = tmp_path_factory.mktemp(f"ddp{request.param}")
    run_ranks("ddp_script.py", request.param, folder)
    return [torch.load(folder / f"{request.param}.{rank}.pt") for rank in range(request.param)], folder


def cases(results):
    return [case for case in results if case != "warnings"]


@pytest.mark.xdist_group("ddp")
def test_every_rank_holds_the_same_bits_after_every_epoch(ranks):
    results, _ = ranks
    assert len(cases(results[0])) >= len(SETTINGS)
    for case in cases(results[0]):
        for epoch in range(3):
            first = results[0][case][epoch]
            for other in results[1:]:
                for kind, values in first.items():
                    assert all(torch.equal(x, other[case][epoch][kind][name]) for name, x in values.items()), case


@pytest.mark.xdist_group("ddp")
def test_ranks_train_as_one_process_on_the_same_global_batches(ranks):
    results, _ = ranks
    for method, accumulate in cases(results[0]):
        if method == "SWAT":  # each process keeps the largest activations of its own rows
            continue
        alone = ddp_script.train(method, accumulate)
        assert sum(int((~mask).sum()) for mask in alone[-1]["masks"].values()) > 0, "proves nothing"
        for ours, reference in zip(results[0][method, accumulate], alone, strict=True):
            for kind, values in reference.items():
                for name, x in values.items():
                    y = ours[kind][name]
                    near = torch.allclose(x, y, rtol=1e-5, atol=1e-8) if x.is_floating_point() else torch.equal(x, y)
                    assert near, (method, kind, name)


@pytest.mark.xdist_group("ddp")
def test_logging_needs_no_rank_0_and_warns_of_nothing(ranks):
    results, folder = ranks
    for result in results:
        assert [message for message in result["warnings"] if "sync_dist" in message or "sparse" in message] == []
    for method, accumulate in cases(results[0]):
        path = folder / str(len(results)) / f"{method}-{accumulate}" / "metrics.csv"
        rows = [row for row in csv.DictReader(path.open()) if row.get("sparsity/model")]
        assert len(rows) == 3
        masks = results[0][method, accumulate][-1]["masks"].values()
        sparsity = 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
        assert float(rows[-1]["sparsity/model"]) == pytest.approx(sparsity, abs=1e-6)
