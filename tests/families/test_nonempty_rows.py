"""Rows that are divided by their norms keep a connection each, whatever the method."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import ROUNDS, SETTINGS, THRESHOLDS, Lit, effective, fit, fits, loader, seeded
from torch import nn
from torch.nn.utils import parametrizations

from lightning_sparse import DFBST, DST, STR, AutoSparse, DeepR, FixedMask, RigL
from lightning_sparse.rules.matrices import Outputs
from lightning_sparse.rules.patterns import UNSTRUCTURED

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")

NORMS = {"old": nn.utils.weight_norm, "new": parametrizations.weight_norm}
NAMES = {
    "old": ("net.0.weight_v", "net.2.weight_v"),
    "new": tuple(f"net.{i}.parametrizations.weight.original1" for i in (0, 2)),
}
#: of 392 weights 26 rows must keep one
SPARSITY = 0.9


def net(norm="new"):
    first, second = (NORMS[norm](nn.Linear(*sizes)) for sizes in ((12, 16), (16, 10)))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(10, 4))


def lit(norm="new", **kwargs):
    return seeded(lambda: Lit(net(norm), **kwargs))


class Rows(pl.Callback):
    """After each step: no row is empty, in the parameter and in the mask, and the loss is finite."""

    def __init__(self, callback, norm):
        self.callback, self.names, self.steps = callback, NAMES[norm], 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps += 1
        assert outputs["loss"].isfinite()
        for name in self.names:
            assert self.callback.mask(name).any(1).all()
            assert (module.get_parameter(name) != 0).any(1).all()


# SRigL has rows of one length: tests/methods/test_srigl.py
METHODS = [name for name in (*SETTINGS, *ROUNDS) if name not in ("DeepR", "SRigL", *THRESHOLDS)]


@pytest.mark.parametrize(
    ("method", "norm"), [*((name, "new") for name in METHODS), ("RigL", "old"), ("TopKAST", "old"), ("GMP", "old")]
)
def test_no_row_of_a_normalised_weight_is_ever_empty(method, norm):
    options = {"backward_sparsity": 0.8} if method == "TopKAST" else {}
    callback = {**SETTINGS, **ROUNDS}[method](sparsity=SPARSITY, **options)
    rows = Rows(callback, norm)
    module, _ = fit([callback, rows], lit(norm), loader(64), max_epochs=3)
    assert rows.steps == 24
    assert effective(module, callback)
    assert sum(callback.layer_count.values()) == 392 - round(SPARSITY * 392)


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("method", ["GMP", "GraNet", "TopKAST", "LotteryTicket"])
def test_no_row_is_empty_where_each_layer_has_its_share(method, distribution):
    options = {"backward_sparsity": 0.8} if method == "TopKAST" else {}
    callback = {**SETTINGS, **ROUNDS}[method](sparsity=SPARSITY, scope="layer", distribution=distribution, **options)
    fit([callback, Rows(callback, "new")], lit(), loader(64), max_epochs=3)
    assert sum(callback.layer_count.values()) == 392 - round(SPARSITY * 392)


@pytest.mark.parametrize("initial", ["magnitude", "global_magnitude"])
def test_starts_leave_no_row_empty(initial):
    module = lit()
    with torch.no_grad():
        module.get_parameter(NAMES["new"][0])[:8] *= 1e-3
    callback = RigL(SPARSITY, initial=initial, update_every=5)
    fit([callback, Rows(callback, "new")], module, loader(96))


@pytest.mark.parametrize("granularity", ["neuron", "layer", "weight"])
@pytest.mark.parametrize("method", THRESHOLDS)
def test_thresholds_leave_the_largest_of_each_row(method, granularity):
    pressing = {"DST": {"alpha": 1.0}, "DFBST": {"alpha": 1.0}, "AutoSparse": {}, "STR": {}}[method]
    start = {"init_threshold": 3.0} if method in ("AutoSparse", "STR") else {}
    callback = SETTINGS[method](granularity=granularity, **pressing, **start)
    if method in ("DST", "DFBST"):
        callback.reset_above = None
    rows = Rows(callback, "new")
    module, _ = fit([callback, rows], lit(), loader(64), max_epochs=3)
    assert rows.steps == 24
    assert effective(module, callback)
    assert callback.layer_density[NAMES["new"][0]] < 2 / 12, "the test would prove nothing"


@pytest.mark.parametrize("granularity", ["neuron", "layer", "weight"])
@pytest.mark.parametrize("method", [DST, DFBST, STR, AutoSparse])
def test_thresholds_meet_a_target_without_an_empty_row(method, granularity):
    callback = method(sparsity=SPARSITY, granularity=granularity, begin_at=0.1, end_at=0.6)
    module, _ = fit([callback, Rows(callback, "new")], lit(), loader(64), max_epochs=3)
    assert effective(module, callback)
    assert sum(callback.layer_count.values()) == 392 - round(SPARSITY * 392)


def test_columns_are_kept_where_they_are_what_is_divided():
    layer = parametrizations.weight_norm(nn.Linear(12, 16), dim=1)
    module = seeded(lambda: Lit(nn.Sequential(layer, nn.ReLU(), nn.Linear(16, 4))))
    callback = RigL(0.92, update_every=4, distribution="uniform")
    fit(callback, module, loader(96))
    mask = callback.masks["net.0.parametrizations.weight.original1"]
    assert mask.any(0).all()
    assert int(mask.sum()) < 16


def test_a_start_with_an_empty_row_is_refused():
    module = lit()
    with torch.no_grad():
        module.get_parameter(NAMES["new"][0])[3] = 0
    with pytest.raises(Exception, match=rf"a connection in each row of {NAMES['new'][0]}, .* 0 / 0"):
        fit(FixedMask(), module, loader(64))


@pytest.mark.parametrize("method", ["RigL", "SNIP", "GMP", "TopKAST", "OptG", "LotteryTicket"])
def test_a_budget_below_the_number_of_rows_is_refused(method):
    options = {"backward_sparsity": 0.8} if method == "TopKAST" else {}
    callback = {**SETTINGS, **ROUNDS}[method](sparsity=0.95, **options)
    with pytest.raises(ValueError, match=r"a weight in each row that is divided by its norm.*takes 26 weights.*is 20"):
        fit(callback, lit(), loader(64), max_epochs=3)


def test_a_target_below_the_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="a weight in each row that is divided by its norm"):
        fit(DST(sparsity=0.95), lit(), loader(64), max_epochs=3)


def test_deep_r_refuses_them_by_name():
    with pytest.raises(Exception, match=rf"each row of {NAMES['new'][0]}, {NAMES['new'][1]} is divided by its norm"):
        fit(DeepR(0.8), lit(), loader(64))
    fit(DeepR(0.8, include=["net.4.weight"]), lit(), loader(64))


def test_random_connections_have_one_in_each_row_and_are_even_draws_otherwise():
    counts, generator = torch.zeros(10, 16), torch.Generator().manual_seed(0)
    for _ in range(300):
        mask = torch.zeros(160, dtype=torch.bool)
        mask[UNSTRUCTURED.draw(32, (10, 16), generator, Outputs())] = True
        assert int(mask.sum()) == 32
        assert mask.view(10, 16).any(1).all()
        counts += mask.view(10, 16)
    assert fits(counts, torch.full((10, 16), 60.0))
    by_column = UNSTRUCTURED.draw(20, (10, 16), generator, Outputs(1)) % 16
    assert len(set(by_column.tolist())) == 16
