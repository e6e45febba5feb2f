"""Methods with masks train with patterns: their units are whole, and as many as were asked for."""

import pytest
import torch
from helpers import MASKED, PLAINLY, ROUNDS, Lit, SavesFirst, cnn, fit, loader, mlp, same, seeded, trainer, watched
from torch import nn
from torch.nn.utils import parametrizations

from lightning_sparse import CHT, DSR, GMP, MEST, SET, SNIP, DeepR, FixedMask, GraNet, OneShot, RandomPruning, RigL
from lightning_sparse.export.semi_structured import fits_2_4, to_semi_structured
from lightning_sparse.rules.budgets import budget
from lightning_sparse.rules.patterns import UNSTRUCTURED
from lightning_sparse.weights.units import units

METHODS = {**MASKED, **ROUNDS}


def fitted(callback):
    """Whether all masks have the pattern, and as many units in all as the sparsity leaves."""
    weights = list(callback._weights.values())
    seen = units(weights, callback.pattern)
    assert sum(each.num_active for each in seen) == budget(callback.sparsity_target, sum(each.size for each in seen))
    return all(callback.pattern.fits(weight.mask, weight.outputs) for weight in weights)


@pytest.mark.parametrize(("pattern", "net"), [("2:4", mlp), ("3:4", cnn), ("block:2x2", cnn), ("row", mlp)])
@pytest.mark.parametrize("method", ["RigL", "SET", "SNIP", "GMP"])
@pytest.mark.filterwarnings("ignore:.*")
def test_one_method_of_each_family_keeps_the_pattern_and_the_number(method, pattern, net):
    callback = METHODS[method](sparsity=0.6, pattern=pattern)
    watch, module, _ = watched(callback, net, max_epochs=2, batches=8)
    assert fitted(callback)
    if method in ("RigL", "SET", "SNIP"):
        assert len(set(map(sum, watch.counts))) == 1 or pattern == "row"
    if pattern != "row":
        assert watch.moves or method == "SNIP"
    for name, mask in callback.masks.items():
        assert not module.get_parameter(name)[~mask].any()


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("GGR", "block:2x2"),
        ("SNFS", "row"),
        ("GraNet", "row"),
        ("ITOP", "1:2"),
        ("MEST", "block:4x2"),
        ("GraSP", "2:4"),
        ("SynFlow", "1:4"),
        ("LotteryTicket", "2:4"),
        ("LotteryTicket", "row"),
        ("ACDC", "2:4"),
        ("ACDC", "block:2x2"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*")
def test_the_others_do_so_with_their_ways_of_choosing(method, pattern):
    callback = METHODS[method](sparsity=0.8, pattern=pattern)
    fit(callback, seeded(lambda: Lit(mlp())), loader(64), max_epochs=3)
    assert fitted(callback)


@pytest.mark.parametrize("initial", ["magnitude", "global_magnitude"])
@pytest.mark.parametrize("pattern", ["2:4", "block:2x2"])
def test_starts_keep_the_largest_units(initial, pattern):
    callback = FixedMask(0.5, initial=initial, pattern=pattern)
    module = seeded(lambda: Lit(nn.Linear(12, 4)))
    W = module.net.weight.detach().clone()
    fit(callback, module, loader(8), max_epochs=1)
    assert fitted(callback)
    mask = callback.masks["net.weight"]
    if pattern == "2:4":
        expected = W.abs().view(4, 3, 4).argsort(2).argsort(2) >= 2
        assert torch.equal(mask.view(4, 3, 4), expected)
    else:
        sums = W.abs().view(2, 2, 6, 2).sum((1, 3)).flatten()
        kept = mask.view(2, 2, 6, 2)[:, 0, :, 0].flatten()
        assert sums[kept].min() > sums[~kept].max()


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", ["2:4", "block:2x2"])
@pytest.mark.filterwarnings("ignore:.*")
def test_one_shot_pruning_does_so_with_either_criterion(criterion, pattern):
    callback = OneShot(0.6, criterion=criterion, pattern=pattern)
    fit(callback, train=loader(32), max_epochs=1)
    assert fitted(callback)
    with pytest.raises(ValueError, match="scope must be 'layer' or 'global' with pattern='2:4', got 'output'"):
        OneShot(0.6, scope="output", pattern="2:4")


@pytest.mark.parametrize(("method", "pattern"), [(SET, "block:2x2"), (RigL, "block:2x2"), (RigL, "2:4"), (SET, "row")])
def test_sparse_layers_train_as_masked_ones(method, pattern):
    masks = {}
    for storage in ("masked", "sparse"):
        callback = method(0.6, pattern=pattern, update_every=3, storage=storage, drop_fraction=0.5)
        fit(callback, train=loader(64), max_epochs=1)
        masks[storage] = callback.masks
        assert fitted(callback)
    assert same(masks["masked"], masks["sparse"])


@pytest.mark.parametrize("pattern", ["2:4", "block:2x2"])
def test_a_resumed_run_ends_as_if_never_stopped(pattern, tmp_path):
    def method(**kwargs):
        return RigL(0.6, update_every=5, **kwargs)

    path = tmp_path / "first.ckpt"
    whole, _ = fit([method(pattern=pattern), SavesFirst(path)], train=loader(96))
    again, resumed = seeded(Lit, seed=5), method(pattern=pattern)
    trainer(resumed).fit(again, loader(96), ckpt_path=path, **PLAINLY)
    assert same(dict(whole.state_dict()), dict(again.state_dict()))
    assert fitted(resumed)
    with pytest.raises(Exception, match=r"was written with pattern='.*', this RigL\(.*\) has 'unstructured': give it"):
        trainer(method()).fit(seeded(Lit), loader(96), ckpt_path=path, **PLAINLY)


class TwoOptimizers(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


@pytest.mark.parametrize("method", [RigL, GMP])
def test_the_weights_of_each_optimizer_keep_their_units(method):
    callback = method(0.75, pattern="block:2x2", update_every=4, include=["net.0.weight", "net.2.weight"])
    fit(callback, seeded(TwoOptimizers), loader(96), max_epochs=1)
    weights = callback._weights.values()
    assert all(callback.pattern.fits(weight.mask, weight.outputs) for weight in weights)
    sizes = [each.size for each in units(list(weights), callback.pattern)]
    assert sum(callback.layer_count.values()) == 4 * sum(budget(0.75, size) for size in sizes)


def test_weights_that_cannot_be_divided_stay_dense_and_the_table_says_so(caplog):
    callback = RigL(None, pattern="2:4")
    with caplog.at_level("INFO"):
        fit(callback, seeded(Lit), loader(8), max_epochs=1)
    assert repr(callback) == "RigL(sparsity=0.5, pattern='2:4')"
    assert list(callback.layer_density.values()) == [0.5, 0.5]
    assert "net.4.weight" not in callback.masks
    assert "dense (2:4: 10 inputs, no multiple of 4)" in caplog.text
    with pytest.raises(Exception, match=r"found nothing to make sparse(.|\n)*block:7x7: 16 outputs, no multiple of 7"):
        fit(RigL(0.5, pattern="block:7x7"), seeded(Lit), loader(8), max_epochs=1)


def test_groups_of_the_full_density_have_their_n_each_throughout():
    callback = RigL(None, pattern="2:4", update_every=2, drop_fraction=0.5)
    watch, module, _ = watched(callback, batches=8)
    assert watch.moves > 1
    for masks in watch.masks:
        assert all((mask.reshape(-1, 4).sum(1) == 2).all() for mask in masks.values())
    assert fits_2_4(module.net[0].weight)


class Careless(RigL):
    """Grows wherever nothing was, whatever the pattern."""

    def grow(self, weight, n, dropped):
        return UNSTRUCTURED.grow_at_random(weight, n, dropped, self.generator)


def test_a_method_that_breaks_its_pattern_is_told_so():
    with pytest.raises(RuntimeError, match=r"connections of net.0.weight so that they have no pattern any more"):
        fit(Careless(0.5, pattern="2:4", update_every=2), train=loader(64), max_epochs=1)
    fit(Careless(0.5, pattern="block:2x2", update_every=2), train=loader(64), max_epochs=1)


def test_what_is_trained_as_2_4_can_be_exported_as_such():
    module = seeded(lambda: Lit(nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 32))))
    fit(SET(None, pattern="2:4"), module, loader(16), max_epochs=2)
    assert fits_2_4(module.net[2].weight)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="needs a CUDA device"):  # the pattern has been found
            to_semi_structured(module)


def test_floors_and_rows_count_units():
    callback = GMP(0.8, pattern="block:2x2", min_layer_density=0.15, scope="global")
    fit(callback, seeded(Lit), loader(64))
    assert fitted(callback)
    assert min(callback.layer_density.values()) >= 0.15
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(12, 16)), nn.ReLU(), nn.Linear(16, 4))
    callback = RigL(0.75, pattern="1:4", update_every=3)
    fit(callback, seeded(lambda: Lit(net)), loader(64), max_epochs=1)
    assert fitted(callback)
    assert all(mask.any(1).all() for mask in callback.masks.values())


@pytest.mark.parametrize("pattern", ["2:4", "block:2x2"])
def test_zeros_of_another_pattern_are_refused(pattern):
    module = seeded(lambda: Lit(nn.Linear(12, 4)))
    module.net.weight.data[0, 0] = 0
    with pytest.raises(Exception, match=r"must have weights of pattern='.*', but those .* in net.weight are not"):
        fit(FixedMask(pattern=pattern), module, loader(8), max_epochs=1)
    with torch.no_grad():
        module.net.weight[:, ::2] = 0
    if pattern == "2:4":
        callback = FixedMask(pattern=pattern)
        fit(callback, module, loader(8), max_epochs=1)
        assert callback.sparsity == 0.5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RigL(0.4, pattern="2:4"), "sparsity must be at least 0.5 with pattern='2:4', got 0.4"),
        (lambda: RigL(0.5, pattern="2:4", min_layer_density=0.6), "no layer a density above 0.5 with pattern='2:4'"),
        (lambda: RigL(0.5, pattern="2:4", distribution="uniform_first_dense"), "Leave layers that are to be dense out"),
        (lambda: RigL(0.5, pattern="2:4", distribution={"*.0.weight": 1.0}), "no layer a density above 0.5"),
        (lambda: DeepR(0.5, pattern="row"), "DeepR cannot have pattern='row': a connection is dropped when its own"),
        (lambda: DSR(0.5, pattern="block:4x4"), "DSR cannot have pattern='block:4x4': it drops each connection"),
        (lambda: CHT(0.5, pattern="2:4"), "CHT cannot have pattern='2:4': paths predict single links"),
        (lambda: GraNet(0.5, pattern="2:4"), "GraNet cannot have pattern='2:4'"),
        (lambda: MEST(0.5, pattern="2:4", soft_bound=True), "soft_bound must be False with pattern='2:4', got True"),
        (lambda: SNIP(0.5, pattern="4:2"), 'pattern must be "unstructured", "N:M" with N below M'),
        (lambda: RandomPruning(None, pattern="row"), "sparsity must be a number from 0 to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
