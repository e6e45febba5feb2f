"""Exact counts where weights join later, belong to several optimizers, or have their densities by pattern."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import Lit, fit, loader, seeded
from torch import nn

from lightning_sparse import GMP, SWAT, AutoSparse, GraNet, LotteryTicket, OptG, TopKAST
from lightning_sparse.rules.budgets import budget, shrunk


class Two(pl.LightningModule):
    """Two layers with an optimizer each, the second of which steps at every fifth batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 4)
        with torch.no_grad():
            self.a.weight.mul_(5)

    def training_step(self, batch, batch_idx):
        x, y = batch
        a, b = self.optimizers()
        a.zero_grad()
        b.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.b(self.a(x).relu()), y))
        a.step()
        if batch_idx % 5 == 4:
            b.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (self.a, self.b)]


class Counts(pl.Callback):
    """The number of active weights of each layer from the start on."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def _look(self):
        self.seen.append([int(mask.sum()) for mask in self.callback.masks.values()])

    def on_train_start(self, trainer, module):
        self._look()

    def on_train_batch_end(self, *args):
        self._look()


@pytest.mark.parametrize(
    "callback",
    [
        TopKAST(0.8, 0.5, scope="global"),
        TopKAST(0.8, 0.5, distribution="erk"),
        SWAT(0.8, scope="global"),
    ],
    ids=["TopKAST-global", "TopKAST-erk", "SWAT-global"],
)
def test_each_optimizer_has_its_exact_budget_from_the_start(callback):
    counts = Counts(callback)
    fit([callback, counts], seeded(Two), loader(80), max_epochs=1)
    assert {tuple(seen) for seen in counts.seen} == {(budget(0.8, 240), budget(0.8, 80))}


@pytest.mark.parametrize(
    "build",
    [
        lambda: GraNet(0.55, initial_sparsity=0.5, update_every=1),
        lambda: GraNet(0.8, initial_sparsity=0.8, update_every=1),
        lambda: GMP(0.8, initial_sparsity=0.75, distribution="erk", update_every=1),
    ],
    ids=["GraNet", "GraNet-static", "GMP"],
)
@pytest.mark.filterwarnings("ignore:.*the training ended")
def test_sparse_starts_are_drawn_for_each_optimizer_as_its_schedule_goes_on(build):
    callback = build()
    counts = Counts(callback)
    fit([callback, counts], seeded(Two), loader(160), max_epochs=1)
    assert counts.seen[0] == [budget(callback.initial_sparsity, size) for size in (240, 80)]
    assert all(later <= earlier for first, then in zip(counts.seen, counts.seen[1:], strict=False)
               for earlier, later in zip(first, then, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    "build",
    [
        lambda: GMP(0.9, update_every=2, end_at=0.9),
        lambda: GMP(0.9, update_every=2, end_at=0.9, scope="layer"),
        lambda: GraNet(0.9, update_every=2, end_at=0.9, initial_sparsity=0.0),
    ],
    ids=["global", "layer", "GraNet"],
)
def test_newcomers_join_the_schedule_where_it_is(build):
    class Unfreeze(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 12:
                for layer in module.net[:3:2]:
                    layer.weight.requires_grad_(True)

    module = seeded(
        lambda: Lit(nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)))
    )
    for layer in module.net[:3:2]:
        layer.weight.requires_grad_(False)
    callback = build()
    counts = Counts(callback)
    fit([callback, counts, Unfreeze()], module, loader(240), max_epochs=1)
    # the step of the 13th batch is number 12, a third of the way is behind it: s = 0.9 (1 - (15/27)^3)
    size = 256 + 768 + 4096
    final = budget(0.9, size)
    assert sum(counts.seen[13]) == final + round((size - final) * (1 - 12 / 27) ** 3)
    assert sum(counts.seen[-1]) == final


PATTERN = {"net.0.weight": 0.3}


@pytest.mark.parametrize(
    ("build", "epochs"),
    [
        (lambda: GMP(0.8, scope="layer", distribution=PATTERN, update_every=2), 2),
        (lambda: LotteryTicket(0.8, rounds=2, scope="layer", distribution=PATTERN), 3),
        (lambda: OptG(0.8, scope="layer", distribution=PATTERN), 2),
        (lambda: GraNet(0.8, initial_sparsity=0.0, distribution=PATTERN, update_every=2), 2),
    ],
    ids=["GMP", "LotteryTicket", "OptG", "GraNet"],
)
def test_methods_that_begin_dense_take_densities_by_pattern(build, epochs):
    callback = build()
    counts = Counts(callback)
    fit([callback, counts], max_epochs=epochs)
    assert counts.seen[0] == [192, 160, 40]
    assert sum(counts.seen[-1]) == budget(0.8, 392)
    if not isinstance(callback, GraNet):  # which compares all layers
        assert counts.seen[-1][0] == round(0.3 * 192)


def test_what_is_above_the_final_counts_shrinks_in_proportion():
    assert shrunk([100, 50, 20], [10, 20, 30], 110) == [10 + 45, 20 + 15, 20]
    assert shrunk([100, 50, 20], [10, 20, 20], 50) == [10, 20, 20]


def test_optg_refuses_floors_above_its_target_when_fit_starts():
    counts = Counts(OptG(0.9, min_layer_density=0.2))
    with pytest.raises(ValueError, match=r"min_layer_density=0\.2 alone takes 79 weights, the budget is 39"):
        fit([counts.callback, counts], max_epochs=1)
    assert not counts.seen


def test_optg_tells_of_a_target_that_was_not_reached():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 20

    with pytest.warns(UserWarning, match=r"OptG.* has \d+ active weights, not 78: only 20 updates of 36 planned"):
        fit([OptG(0.8), Stop()], max_epochs=2, min_epochs=0)
    assert OptG(0.8, steepness=2000.0).steepness == 2000
    fit(OptG(0.8, steepness=2000.0), max_epochs=1)


@pytest.mark.parametrize("granularity", ["layer", "neuron", "weight"])
def test_autosparse_gives_all_active_weights_a_gradient_whatever_the_thresholds(granularity):
    """A row all active beside one of larger weights all masked: B has five of eight places, four of them are A's."""
    callback = AutoSparse(0.5, decay="none", backward_density=0.625, granularity=granularity, init_threshold=-3.0)

    class Net(Lit):
        def training_step(self, batch, batch_idx):
            return self.net(torch.ones(1, 4)).sum()

    class Look(pl.Callback):
        def on_train_start(self, trainer, module):
            weight = callback._weights["net.weight"]
            if granularity != "layer":
                t = torch.tensor([-4.0, 0.0])  # thresholds of 0.018 and 0.5
                weight.thresholds["t"].data.copy_(t if granularity == "neuron" else t.view(2, 1).expand(2, 4))
                callback._projection.project([weight])

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.P, self.dW = module.net.weight.detach().clone(), module.net.weight.grad.clone()

    module, look = Net(nn.Linear(4, 2, bias=False)), Look()
    module.net.weight.data.copy_(torch.tensor([[0.06, 0.07, 0.08, 0.09], [0.3, 0.31, 0.32, 0.33]]))
    fit([callback, look], module, loader(8), max_epochs=1)
    assert (look.dW[look.P != 0] == 1).all()
    assert int((look.dW == 0.5).sum()) == (0 if granularity == "layer" else 1)
