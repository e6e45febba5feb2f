"""Threshold methods with a target: the plan, its exact end, and what must not disturb it."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    THRESHOLDS,
    Lit,
    Recurrent,
    Scaler,
    StopsAfter,
    Unmixed,
    Watch,
    cnn,
    data,
    effective,
    fit,
    loader,
    mlp,
    same,
    saved,
    seeded,
    state,
    trainer,
    watched,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reference import Reference, broadcast
from torch import nn

from lightning_sparse import DFBST, DST, STR, AutoSparse, attach
from lightning_sparse.rules.budgets import budget, least

METHODS = {
    "DST": lambda sparsity=0.8, **kw: DST(sparsity=sparsity, **kw),
    "DFBST": lambda sparsity=0.8, **kw: DFBST(sparsity=sparsity, **{"beta": 0.5, **kw}),
    "AutoSparse": lambda sparsity=0.8, **kw: AutoSparse(sparsity=sparsity, **kw),
    "STR": lambda sparsity=0.8, **kw: STR(sparsity=sparsity, **kw),
}
NETS = {"mlp": mlp, "cnn": cnn, "lstm": Recurrent}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def planned(update, total, start, final, begin=0.2, end=0.75):
    """The number of nonzeros after an update, counted from 1, by GMP's formula."""
    first, last = int(begin * total), math.ceil(end * total)
    p = min(max((update - first) / (last - first), 0), 1)
    return final + (start - final) * (1 - p) ** 3


def totals(watch):
    return [sum(counts) for counts in watch.counts]


class Thresholds(pl.Callback):
    """Keep the thresholds after each batch."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def on_train_batch_end(self, *args):
        self.seen.append({name: t.clone() for name, t in self.callback.thresholds.items()})


# ---------------------------------------------------------------------- the plan and its end


@pytest.mark.parametrize(("net", "sparsity"), [("mlp", 0.98), ("cnn", 0.5), ("lstm", 0.9)])
@pytest.mark.filterwarnings("ignore:.*has no weight left")
def test_the_count_follows_the_plan_and_ends_at_the_budget(method, net, sparsity):
    callback = METHODS[method](sparsity)
    watch, module, _ = watched(callback, NETS[net], 30)
    counts, final = totals(watch), budget(sparsity, callback.size)
    start = counts[5]
    if method != "AutoSparse":  # whose thresholds begin at sigmoid(-5)
        assert counts[:6] == [callback.size] * 6
    assert all(abs(n - planned(i, 30, start, final)) <= 2 for i, n in enumerate(counts[6:], 7))
    assert counts[6:] == sorted(counts[6:], reverse=True), "a saw-tooth"
    assert counts[22:] == [final] * 8
    assert all(same(mask, watch.masks[22]) for mask in watch.masks[22:])
    assert callback.density == final / callback.size
    assert effective(module, callback)
    assert not any(weight.thresholds.resets for weight in callback._weights.values())


@pytest.mark.parametrize("granularity", ["neuron", "layer", "weight"])
def test_every_granularity_follows_the_plan(method, granularity):
    callback = METHODS[method](granularity=granularity)
    watch, _, _ = watched(callback, cnn, 20)
    counts, final = totals(watch), budget(0.8, callback.size)
    assert all(abs(n - planned(i, 20, counts[3], final)) <= 2 for i, n in enumerate(counts[4:], 5))
    assert counts[14:] == [final] * 6


@pytest.mark.parametrize(("batches", "begin", "end"), [(1, 0.0, 1.0), (7, 0.3, 0.61), (10, 0.9, 0.95)])
def test_any_schedule_ends_at_the_budget(method, batches, begin, end):
    callback = METHODS[method](0.9, begin_at=begin, end_at=end)
    watch, _, _ = watched(callback, mlp, batches)
    assert totals(watch)[-1] == budget(0.9, 392) == 39


def test_thresholds_rest_before_pruning_begins_and_after_it_has_ended(method):
    callback = METHODS[method]()
    looks = Thresholds(callback)
    fit([callback, looks], train=loader(240), max_epochs=1)
    start = -200.0 if method in ("AutoSparse", "STR") else 0.0
    assert all((t == start).all() for seen in looks.seen[:6] for t in seen.values())
    assert sum(not same(looks.seen[i], looks.seen[i + 1]) for i in range(6, 21)) > 10
    for seen in looks.seen:  # thresholds take no steps of their own: all have one level
        assert len({float(value) for t in seen.values() for value in t.flatten()}) == 1
    assert all(same(seen, looks.seen[22]) for seen in looks.seen[22:])


def quantised(module):
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.copy_(p.sign() * 0.25)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ties_and_bfloat16_end_at_the_budget_and_ties_are_spread_over_rows(method, dtype):
    """All magnitudes of a layer are equal, and with a learning rate of 0 they stay so."""
    callback = METHODS[method](0.75)
    module = quantised(seeded(lambda: Lit(mlp(dtype), lambda p: torch.optim.SGD(p, lr=0.0))))
    fit(callback, module, loader(96, dtype=dtype), max_epochs=1)
    assert sum(callback.layer_count.values()) == budget(0.75, callback.size) == 98
    assert effective(module, callback)
    for mask in callback.masks.values():
        rows = mask.sum(1)
        assert rows.max() - rows.min() <= 2


def test_bfloat16_ends_at_the_budget(method):
    callback = METHODS[method](0.9)
    module, _ = fit(callback, seeded(lambda: Lit(mlp(torch.bfloat16))), loader(dtype=torch.bfloat16), max_epochs=1)
    assert sum(callback.layer_count.values()) == budget(0.9, 392)
    assert effective(module, callback)


def test_weights_that_are_zero_or_not_finite_do_not_disturb_the_end(method):
    class Spoils(pl.Callback):
        def on_train_batch_end(self, run, module, outputs, batch, index):
            if index == 9:
                callback._weights["net.2.weight"].latent[0, :3] = torch.tensor([float("nan"), float("inf"), 0.0])

    callback = METHODS[method]()
    module = seeded(Lit)
    nn.init.zeros_(module.net[4].weight)
    fit([callback, Spoils()], module, max_epochs=1)
    assert sum(int(weight.frozen.sum()) for weight in callback._weights.values()) == budget(0.8, 392)


def test_no_layer_falls_below_its_floor(method):
    callback = METHODS[method](0.8, min_layer_density=0.1, begin_at=0.0)
    watch, _, _ = watched(callback, cnn, 30)
    lowest = [least(0.1, weight.size) for weight in callback._weights.values()]
    assert all(n >= low for counts in watch.counts for n, low in zip(counts, lowest, strict=True))
    assert totals(watch)[-1] == budget(0.8, callback.size)


# ---------------------------------------------------------------------- the formulas


class Planned(Reference):
    """The autograd reference, whose thresholds are shifted by sorting all margins after each step."""

    shrinkage = 1.0
    begun = False

    def margins(self):
        found = []
        for name, W in self.W.items():
            t = broadcast(self.t[name], W)
            hard = W.abs() - (t.abs() if self.method == "DFBST" else t)
            found.append((torch.logit(W.abs()) - t if self.method in ("AutoSparse", "STR") else hard).flatten())
        return torch.cat(found).detach()

    @torch.no_grad()
    def shift(self, k):
        ranked = self.margins().sort(descending=True).values
        c = (ranked[k - 1] + ranked[k]) / 2
        for t in self.t.values() if not ranked[k] <= 0 < ranked[k - 1] else ():
            t.copy_((t.abs() + c).clamp(min=0) if self.method == "DFBST" else t + c)

    @torch.no_grad()
    def freeze(self):
        left = {name: self.effective(name) for name in self.names}
        self.frozen = {name: P != 0 for name, P in left.items()}

    def effective(self, name):
        W, frozen = self.W[name], getattr(self, "frozen", None)
        if frozen is not None:
            return W * frozen[name]
        P = super().effective(name)
        if self.method in ("AutoSparse", "STR"):
            T = torch.sigmoid(broadcast(self.t[name], W)).detach()
            P = P + (1 - self.shrinkage) * T * W.sign() * (W.abs() > T)
        if self.begun and P.requires_grad:
            P.register_hook(lambda dP: bounded(dP, P.detach()))
        return P


def bounded(dP, P):
    """Rows without a connection get no longer gradients than the others have, by root mean square."""
    lengths = {row: math.sqrt(sum(float(g) ** 2 for g in dP[row])) for row in range(len(dP))}
    occupied = [row for row in lengths if any(P[row] != 0)]
    if not occupied:
        return dP
    bound = math.sqrt(sum(lengths[row] ** 2 for row in occupied) / len(occupied))
    factors = [1.0 if row in occupied or not lengths[row] else min(1.0, bound / lengths[row]) for row in lengths]
    return dP * torch.tensor(factors, dtype=dP.dtype)[:, None]


@torch.no_grad()
def plain_steps(parameters, rate):
    """Adam would take the size out of gradients: descend along these, and leave none to it."""
    for t in (t for t in parameters if t.grad is not None):
        t.sub_(rate * t.grad)
        t.grad = None


def train_planned(method, optimizer, batches, sparsity, options):
    names = ["0.weight", "2.weight", "4.weight"]
    reference = Planned(seeded(lambda: mlp(torch.float64)), names, method, options.pop("granularity"), **options)
    if method in ("DST", "DFBST"):
        reference.options["alpha"] = 0.0
    optimizer, (x, y) = optimizer(reference.trained()), data(240, torch.float64)
    reference.anneal(0, 1)
    size = sum(W.numel() for W in reference.W.values())
    first, last = int(0.2 * batches), math.ceil(0.75 * batches)
    for i in range(batches):
        batch = slice(8 * i, 8 * i + 8)
        optimizer.zero_grad()
        reference.loss(lambda call, b=batch: nn.functional.cross_entropy(call(x[b]), y[b])).backward()
        if i < last:
            reference.mask_gradients()
        if i == first:
            start = sum(int(mask.sum()) for mask in reference.masks().values())
        reference.begun = first <= i < last
        for t in reference.t.values():
            t.grad = None
        if isinstance(optimizer, torch.optim.Adam):
            plain_steps(reference.t_b.values(), optimizer.param_groups[0]["lr"])
        optimizer.step()
        if first <= i < last:
            final = budget(sparsity, size)
            k = final + round((start - final) * (1 - (i + 1 - first) / (last - first)) ** 3)
            reference.shift(k)
            reference.shrinkage = (1 - (i + 1 - first) / (last - first)) ** 3
        if i + 1 == last:
            reference.freeze()
    return reference


@pytest.mark.parametrize(("optimizer", "sparsity"), [("SGD", 0.8), ("Adam", 0.8), ("SGD", 0.95)])
def test_trains_as_the_reference_that_sorts_all_margins(method, optimizer, sparsity):
    make = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
        "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    }[optimizer]
    options = {
        "DST": {"granularity": "neuron"},
        "DFBST": {"granularity": "neuron", "beta": 0.5},
        "AutoSparse": {"granularity": "layer", "alpha": 0.75, "init_threshold": -5.0},
        "STR": {"granularity": "layer", "init_threshold": -200.0},
    }[method]
    reference = train_planned(method, make, 24, sparsity, dict(options))
    callback = METHODS[method](sparsity, **options)
    fit(callback, seeded(lambda: Lit(mlp(torch.float64), make)), loader(192, dtype=torch.float64), max_epochs=1)
    for name in reference.names:
        ours = callback._weights[f"net.{name}"]
        assert torch.equal(ours.frozen, reference.frozen[name])
        assert torch.allclose(ours.latent, reference.W[name].detach(), rtol=1e-6, atol=1e-9)
        assert torch.allclose(callback.thresholds[f"net.{name}"], reference.t[name].detach(), rtol=1e-6, atol=1e-9)


class Normed(nn.Module):
    """A layer whose outputs lie along axis 1, before a batch norm."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.ConvTranspose2d(12, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.norm(self.layer(x[:, :, None, None])).flatten(1))


def test_filters_without_a_connection_do_not_explode_through_a_batch_norm():
    """Their outputs have the standard deviation 0, by which it divides gradients: their weights grew to 81."""
    callback = AutoSparse(sparsity=0.95, include=["*layer.weight", "*head.weight"])
    emptied = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, *args):
            emptied.append(int((~callback.masks["net.layer.weight"].any(0)).sum()))

    module = seeded(lambda: Lit(Normed(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)))
    fit([callback, Looks()], module, loader(800), max_epochs=1)
    assert max(emptied) > 5
    assert callback.latents["net.layer.weight"].abs().max() < 3


@pytest.mark.parametrize("t", [-1000.0, -5.0, -0.1, 0.0, 0.3, 1000.0])
def test_one_threshold_has_the_level_of_several(method, t):
    callback = METHODS[method]()
    level = callback.level(torch.tensor([t], dtype=torch.float64))
    assert torch.allclose(torch.tensor([callback.level(t)], dtype=torch.float64), level, rtol=1e-14, atol=0)


@pytest.mark.parametrize("by", [-0.02, 0.03])
def test_a_weight_passes_shifted_thresholds_if_its_margin_exceeds_the_shift(method, by):
    callback, t = METHODS[method](), {"AutoSparse": -2.0, "STR": -2.0}.get(method, 0.1)
    W = torch.linspace(0.05, 0.2, 500, dtype=torch.float64)
    level = callback.level(torch.tensor(callback.shifted(t, by), dtype=torch.float64))
    assert torch.equal(level < W, callback.margins(W, t) > by)
    assert 0 < (level < W).sum() < 500


def margins(callback, weight):
    """All margins of a weight, by the formulas."""
    W, t = weight.latent.double().abs(), weight.thresholds["t"].double().view(-1)[0]
    if isinstance(callback, AutoSparse | STR):
        return torch.logit(W) - t
    return W - (t.abs() if isinstance(callback, DFBST) else t)


@torch.no_grad()
def test_weights_with_other_thresholds_are_cut_at_one_level_as_sorting_all_margins_does(method):
    callback = METHODS[method](0.8)
    module = seeded(mlp)
    with attach(callback, module, torch.optim.SGD(module.parameters(), lr=0.0), steps=20):
        for each, by in zip(callback._weights.values(), (0.0, 0.02, 0.05), strict=True):
            each.thresholds["t"].add_(by)
        plan = next(iter(callback._target._plans.values()))
        before = {each: each.thresholds["t"].clone() for each in callback._weights.values()}
        ranked = torch.cat([margins(callback, each).flatten() for each in before]).sort(descending=True).values
        callback._target._bring(plan, list(before), 100)
        level = (ranked[99] + ranked[100]) / 2
        for each, t in before.items():
            expected = (t.double().abs() + level).clamp(min=0) if method == "DFBST" else t.double() + level
            assert torch.equal(each.thresholds["t"], expected.float())


# ---------------------------------------------------------------------- what must not disturb it


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_run_is_resumed_bit_for_bit_before_on_and_after_the_plan(method, epoch, tmp_path):
    whole = METHODS[method](begin_at=0.4, end_at=0.7)
    one, _ = fit(whole, train=loader(96), max_epochs=4)
    _, run = fit([METHODS[method](begin_at=0.4, end_at=0.7), StopsAfter(epoch)], train=loader(96), max_epochs=4)
    kept = saved(run, tmp_path / "part.ckpt")
    assert any("sparsity" in str(value) for value in kept["callbacks"].values())
    resumed = METHODS[method](begin_at=0.4, end_at=0.7)
    two = seeded(Lit, 9)
    trainer(resumed, max_epochs=4).fit(two, loader(96), ckpt_path=tmp_path / "part.ckpt")
    assert same(state(whole), state(resumed))
    assert same(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_amp_skips_does_not_advance_the_plan(method, fused):
    class Bad(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx in (8, 9, 14) else 1)

    results = []
    for module, batches in ((Bad, 30), (Lit, 27)):
        callback = METHODS[method](begin_at=6 / batches, end_at=21 / batches)
        make = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=fused)  # noqa: E731
        watch = Watch(callback)
        kind = seeded(lambda m=module, make=make: m(optimizer=make))
        fit([callback, watch], kind, loader(8 * batches), max_epochs=1, plugins=[Unmixed(Scaler())])
        results.append(totals(watch))
    skipping, plain = results
    assert [n for i, n in enumerate(skipping) if i not in (8, 9, 14)] == plain
    assert [skipping[i] == skipping[i - 1] for i in (8, 9, 14)] == [True] * 3
    assert skipping[-1] == budget(0.8, 392)


@pytest.mark.parametrize("accumulate", [3])
def test_accumulated_batches_are_one_step_of_the_plan(method, accumulate):
    callback = METHODS[method]()
    watch, _, _ = watched(callback, mlp, 60, accumulate_grad_batches=accumulate, gradient_clip_val=0.1)
    counts = totals(watch)[2::3]
    assert all(abs(n - planned(i, 20, counts[3], 78)) <= 2 for i, n in enumerate(counts[4:], 5))
    assert counts[-1] == 78


class Alternating(Lit):
    """Two optimizers, the second of which steps half as often."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.toggled = [optimizer for i, optimizer in enumerate(self.optimizers()) if batch_idx % (i + 1) == 0]
        for optimizer in self.toggled:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.toggled:
            optimizer.step()

    def configure_optimizers(self):
        nets = [self.net[:2], self.net[2:]]
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]


def test_the_weights_of_each_optimizer_meet_the_target_by_themselves(method):
    callback = METHODS[method](end_at=0.3)
    fit(callback, seeded(Alternating), max_epochs=1)
    counts = list(callback.layer_count.values())
    assert counts[0] == budget(0.8, 192)
    assert sum(counts[1:]) == budget(0.8, 200)


@pytest.mark.parametrize("batch", [2, 12, 26])
def test_weights_that_join_later_join_the_plan(method, batch):
    class Joins(Lit):
        def on_train_batch_start(self, *args):
            if args[1] == batch:
                self.optimizers().optimizer.add_param_group({"params": list(self.net[2].parameters())})

        def configure_optimizers(self):
            return torch.optim.SGD([*self.net[0].parameters(), *self.net[4].parameters()], lr=0.1)

    callback = METHODS[method]()
    watch = Watch(callback)
    fit([callback, watch], seeded(Joins), max_epochs=1)
    counts = totals(watch)
    assert len(callback.masks) == 3
    assert counts[-1] == budget(0.8, 392)
    if batch == 12:
        start = counts[5] + 160
        assert all(abs(n - planned(i, 30, start, 78)) <= 2 for i, n in enumerate(counts[13:], 14))


def test_a_second_fit_keeps_the_masks(method):
    callback = METHODS[method]()
    module, _ = fit(callback, max_epochs=1)
    before = copy.deepcopy(callback.masks)
    fit(callback, module, max_epochs=1)
    assert same(before, callback.masks)


def test_gradients_are_those_of_what_is_left(method):
    callback = METHODS[method](0.9)
    fit(callback, max_epochs=1)
    assert callback.gradient_density == pytest.approx(budget(0.9, 392) / 392)


def test_the_planned_sparsity_is_logged(method):
    callback = METHODS[method]()
    found = []

    class Reads(pl.Callback):
        def on_train_epoch_end(self, run, module):
            found.append(callback.metrics(callback.layer_count))

    fit([callback, Reads()], train=loader(80), max_epochs=4)
    assert "sparsity/planned" in found[1]
    assert found[1]["sparsity/planned"] == pytest.approx(found[1]["sparsity/model"], abs=0.01)
    assert found[3]["sparsity/planned"] == pytest.approx(0.8, abs=0.002)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("build", [DST, DFBST])
@pytest.mark.parametrize("arguments", [{}, {"alpha": 1e-3, "sparsity": 0.9}])
def test_exactly_one_of_alpha_and_sparsity_is_given(build, arguments):
    with pytest.raises(ValueError, match=rf"{build.__name__} takes either alpha or sparsity, got alpha="):
        build(**arguments)


def test_str_needs_a_start_or_a_target():
    with pytest.raises(ValueError, match=r"STR needs init_threshold or sparsity, got neither\. Try init_threshold=-5"):
        STR()
    assert STR(init_threshold=-3, sparsity=0.9).init_threshold == -3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be below 1"),
        ({"begin_at": 0.8}, "begin_at must be below end_at=0.75, got 0.8"),
        ({"min_layer_density": 2}, "min_layer_density must be a number from 0 to 1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method](**arguments)


def test_floors_above_the_target_and_a_training_without_end_are_refused(method):
    with pytest.raises(ValueError, match=r"min_layer_density=0\.5 alone takes"):
        fit(METHODS[method](min_layer_density=0.5))
    with pytest.raises(MisconfigurationException, match="must know how long the training is, of which it prunes in"):
        fit(METHODS[method](**({"decay": "none"} if method == "AutoSparse" else {})), max_epochs=-1)


def test_a_checkpoint_of_another_target_is_refused(method, tmp_path):
    _, run = fit(METHODS[method](0.8), train=loader(16), max_epochs=1)
    saved(run, tmp_path / "other.ckpt")
    for other in (METHODS[method](0.9), THRESHOLDS[method]()):
        with pytest.raises(MisconfigurationException, match=r"written with sparsity=0\.8"):
            trainer(other).fit(seeded(Lit), loader(16), ckpt_path=tmp_path / "other.ckpt")


def test_a_training_that_ends_before_the_plan_is_told(method):
    with pytest.warns(UserWarning, match="has not come to its sparsity: the training ended after 10 updates"):
        fit([METHODS[method](), StopsAfter()], train=loader(80), max_epochs=4)


def test_a_target_needs_no_weight_decay(method, recwarn):
    fit(METHODS[method](), seeded(lambda: Lit(optimizer=lambda p: torch.optim.SGD(p, 0.1))), loader(16), max_epochs=1)
    assert not any("no weight decay" in str(warning.message) for warning in recwarn)


def test_a_granularity_that_changes_nothing_is_told(recwarn):
    other = {"sparsity": 0.8, "granularity": "layer"}
    for callback in (DST(**other), DFBST(**other), STR(sparsity=0.8)):
        fit(callback, train=loader(16), max_epochs=1)
    told = [str(warning.message) for warning in recwarn if "granularity" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith("DST(granularity='layer', sparsity=0.8) gains nothing by granularity")
