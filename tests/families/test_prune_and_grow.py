"""Methods that move connections: exact budgets after every step, on networks of all kinds."""

import warnings
from itertools import product

import pytest
import torch
from helpers import NETS, Lit, Residual, Watch, cnn, fit, loader, seeded, watched

from lightning_sparse import DSR, GGR, ITOP, MEST, SET, SNFS, DeepR, RandomPruning, RigL
from lightning_sparse.families.prune_and_grow import PruneAndGrow

MOVERS = {
    "SET": lambda s, **kw: SET(s, update_every=3, **kw),
    "RigL": lambda s, **kw: RigL(s, update_every=3, stop_at=1.0, **kw),
    "ITOP": lambda s, **kw: ITOP(s, update_every=3, **kw),
    "MEST": lambda s, **kw: MEST(s, update_every=3, stop_at=1.0, **kw),
    "GGR": lambda s, **kw: GGR(s, drop_fraction=0.3, update_every=3, stop_at=1.0, **kw),
    "SNFS": lambda s, **kw: SNFS(s, update_every=3, **kw),
    "DSR": lambda s, **kw: DSR(s, init_threshold=0.1, update_every=3, stop_at=1.0, **kw),
    "DeepR": lambda s, **kw: DeepR(s, l1=0.01, **kw),
    "DeepR-global": lambda s, **kw: DeepR(s, l1=0.01, scope="global", **kw),
}
LOCAL = {"SET", "RigL", "ITOP", "MEST", "DeepR"}

# ---------------------------------------------------------------------- exact budgets, on real networks


@pytest.mark.parametrize(("net", "sparsity"), [*product(NETS, [0.9]), ("cnn", 0.5), ("cnn", 0.99)])
@pytest.mark.parametrize("method", MOVERS)
@pytest.mark.filterwarnings("ignore:.*has no weight left")
def test_the_budget_is_kept_exactly_after_every_step(method, net, sparsity):
    watch, _, _ = watched(MOVERS[method](sparsity), NETS[net])
    size = sum(mask.numel() for mask in watch.callback.masks.values())
    assert {sum(counts) for counts in watch.counts} == {size - round(sparsity * size)}
    if method in LOCAL:
        assert len({tuple(counts) for counts in watch.counts}) == 1
    if sparsity < 0.99:
        first, last = watch.masks[0], watch.masks[-1]
        assert any(not torch.equal(mask, last[name]) for name, mask in first.items())


@pytest.mark.parametrize("method", MOVERS)
def test_no_layer_falls_below_min_layer_density(method):
    watch, _, _ = watched(MOVERS[method](0.9, min_layer_density=0.09, distribution="uniform"), Residual)
    sizes = [mask.numel() for mask in watch.callback.masks.values()]
    assert all(n >= 0.09 * size for counts in watch.counts for n, size in zip(counts, sizes, strict=True))
    if method not in LOCAL:
        assert len({tuple(counts) for counts in watch.counts}) > 1, "connections have moved between layers"


@pytest.mark.parametrize("method", ["GGR", "SNFS", "DSR", "DeepR-global"])
def test_connections_move_between_layers(method):
    watch, _, _ = watched(MOVERS[method](0.8, distribution="uniform"), cnn)
    assert watch.counts[0] != watch.counts[-1]


def test_a_layer_without_connections_is_named_at_the_end_of_the_epoch():
    callback = RandomPruning(0.8, distribution={"net.2.weight": 0.0})
    with pytest.warns(UserWarning, match=r"net\.2\.weight has no weight left: density 0"):
        fit(callback, seeded(Lit), loader(32), max_epochs=1)
    assert callback.layer_density["net.2.weight"] == 0
    assert callback.density == pytest.approx(0.2, abs=0.002)


@pytest.mark.parametrize("method", sorted(MOVERS.keys() - {"DeepR", "DeepR-global"}))
def test_a_training_too_short_for_any_update_is_told(method):
    with pytest.warns(UserWarning, match=r"will move no connection: the training is too short"):
        watched(MOVERS[method](0.8), batches=3)


def test_ties_are_settled_alike_in_every_run():
    class Level(Lit):
        def training_step(self, batch, batch_idx):
            return sum(p.sum() for p in self.net.parameters())  # all gradients are 1

    runs = []
    for _ in range(2):
        callback = GGR(0.8, drop_fraction=0.5, update_every=2, stop_at=1.0, seed=1)
        fit(callback, seeded(Level), loader(48), max_epochs=1)
        runs.append(callback.masks)
    assert all(torch.equal(mask, runs[1][name]) for name, mask in runs[0].items())


# ---------------------------------------------------------------------- ITOP, MEST, DeepR


def test_a_weight_without_gradient_is_left_out_and_the_budget_kept():
    class Half(Lit):
        def training_step(self, batch, batch_idx):
            return self.net[0](batch[0]).pow(2).mean() if batch_idx % 2 else super().training_step(batch, batch_idx)

    for name, build in MOVERS.items():
        callback = build(0.8)
        watch = Watch(callback)
        fit([callback, watch], seeded(Half), loader(96), max_epochs=1)
        assert {sum(counts) for counts in watch.counts} == {392 - round(0.8 * 392)}, name


# ---------------------------------------------------------------------- state and arguments


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GGR(0.9, random_share=1.5), r"random_share must be a number from 0 to 1, got 1\.5"),
        (lambda: SNFS(0.9, smoothing=1.0), r"smoothing must be below 1, got 1\.0.*value is 0\.9"),
        (lambda: SNFS(0.9, smoothing=-1), r"smoothing must be a number from 0 to 1"),
        (lambda: DSR(0.9, init_threshold=0), r"init_threshold must be a finite number above 0, got 0.*value is 1e-3"),
        (lambda: DSR(0.9, init_threshold=-1), r"init_threshold must be a finite number above 0"),
        (lambda: DSR(0.9, tolerance=2), r"tolerance must be a number from 0 to 1, got 2"),
        (lambda: DSR(0.9, tolerance=1.0), r"tolerance must be below 1, got 1\.0"),
        (lambda: ITOP(0.9, growth="both"), r"growth must be one of \['gradient', 'random'\], got 'both'"),
        (lambda: MEST(0.9, gradient_weight=-0.5), r"gradient_weight must be a finite number of at least 0, got -0\.5"),
        (lambda: DeepR(0.9, l1=-1), r"l1 must be a finite number of at least 0, got -1"),
        (lambda: DeepR(0.9, temperature=float("nan")), r"temperature must be a finite number of at least 0, got nan"),
        (lambda: DeepR(0.9, scope="pool"), r"scope must be one of \['global', 'layer'\], got 'pool'"),
        (lambda: SET(0.9, drop_fraction=0), r"drop_fraction must be above 0, got 0.*RandomPruning"),
        (lambda: RigL(0.9, update_every=0), r"update_every must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


class Regrown(PruneAndGrow):
    """Grows connections that are there, as a method of one's own may by mistake."""

    def grow(self, weight, n, dropped):
        return weight.active_indices[:n]


def test_positions_that_are_not_free_are_refused():
    with pytest.raises(RuntimeError, match=r"Regrown\(.* active weights after moving .*grow`` different inactive ones"):
        fit(Regrown(0.5, update_every=2), max_epochs=1)


def test_nothing_is_told_of_a_training_long_enough():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(will move|has no weight left|above its budget)")
        for build in MOVERS.values():
            watched(build(0.5), batches=20)
