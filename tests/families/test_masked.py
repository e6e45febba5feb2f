"""The engine of masks: what is inactive stays exactly 0, whatever the optimizer; what is new starts quietly."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from helpers import MASKED, REPRESENTATIVES, Lit, Scaler, Unmixed, Watch, cnn, fit, loader, mlp, seeded
from torch import nn

from lightning_sparse import SET, RandomPruning, RigL
from lightning_sparse.families.masked import MaskedCallback
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.rules import select
from lightning_sparse.storage import SparseLinear
from lightning_sparse.weights.base import optimizer_state
from lightning_sparse.weights.fresh import SCALES
from lightning_sparse.weights.masked import MaskedWeight
from lightning_sparse.weights.sparse import SparseWeight

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "SGD, Nesterov, dampened": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.02, weight_decay=1e-2, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=1e-2, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05, weight_decay=1e-2, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 0.5, weight_decay=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.02, weight_decay=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.02, weight_decay=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.02, weight_decay=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.05, t0=5, weight_decay=1e-2),
    "gradients made whole again": lambda p: Shifts(p, 0.1),
}


class Shifts(torch.optim.SGD):
    """Moves every element, whatever its gradient, as optimizers that take a matrix as a whole do (Muon, Shampoo)."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(0.01)
        return loss


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("build", "accumulate"),
    [(lambda: SET(0.8, update_every=4), 1), (lambda: RigL(0.8, update_every=4, decay="none"), 3)],
)
def test_inactive_weights_are_exactly_0_after_every_step(build, optimizer, accumulate):
    callback = build()
    looks = Watch(callback)
    fit([callback, looks], seeded(lambda: Lit(optimizer=OPTIMIZERS[optimizer])), accumulate_grad_batches=accumulate)
    assert len(looks.masks) == 60
    assert looks.moves >= 3, "the test would prove nothing"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_gradient_that_is_not_finite_changes_nothing_where_a_weight_is_inactive(optimizer, value):
    def train(broken):
        callback, module = RandomPruning(0.8, seed=1), seeded(lambda: Lit(optimizer=OPTIMIZERS[optimizer]))

        def breaks(gradient):
            mask = callback.masks["net.2.weight"]
            return gradient.masked_fill(~mask, value) if callback._fit.trainer.global_step in broken else gradient

        module.net[2].weight.register_hook(breaks)
        fit([callback, Watch(callback)], module, gradient_clip_val=1.0, max_epochs=1)
        return module.state_dict()

    whole, ours = train(()), train((5, 6, 20))
    assert all(torch.equal(x, ours[name]) for name, x in whole.items())


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [*((method, "SGD") for method in MASKED), *((method, "AdamW") for method in REPRESENTATIVES[2:])],
)
def test_inactive_weights_are_exactly_0_after_every_step_with_a_scaler_and_accumulation(method, optimizer):
    callback = MASKED[method]()
    looks = Watch(callback)
    module = seeded(lambda: Lit(cnn(), optimizer=OPTIMIZERS[optimizer]))
    fit([callback, looks], module, accumulate_grad_batches=2, plugins=[Unmixed(Scaler())])
    assert callback.sparsity > 0.02


def step(callback, optimizer, module, x):
    """One step as the Trainer takes it."""
    optimizer.zero_grad()
    module(x).square().sum().backward()
    callback.before_step(optimizer, 1.0, 1.0)
    callback.before_update(optimizer)
    optimizer.step()
    callback.after_update(optimizer)


def by_hand(callback, make_optimizer, steps, module=None):
    """Attach to a small network and take ``steps`` steps; return the network."""
    torch.manual_seed(0)
    module = mlp() if module is None else module
    optimizer = make_optimizer(module.parameters())
    callback.attach([c for c in select_parameters(module) if c.reason is None], [optimizer], False)
    x = torch.randn(steps, 5, 12)
    for row in x:
        step(callback, optimizer, module, row)
    return module


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adadelta"])
def test_connections_that_are_not_kept_lose_their_optimizer_state_and_others_keep_theirs(name, layout):
    callback = RigL(0.5, update_every=10**9)
    by_hand(callback, OPTIMIZERS[name], 1, seeded(cnn).to(memory_format=layout))
    weight = callback._weights["4.weight"]
    before = [state.clone() for _, state in optimizer_state(weight)]
    values, mask = weight.W.clone(), weight.mask.clone()
    kept = torch.rand(weight.shape) < 0.7
    weight.keep(kept)
    staying, after = mask & kept, [state for _, state in optimizer_state(weight)]
    assert torch.equal(weight.mask, staying)
    assert torch.equal(weight.W, values * staying)
    assert len(after) == {"SGD": 1, "Adam": 3, "AdamW": 2, "RMSprop": 3, "Adadelta": 2}[name]
    for old, new in zip(before, after, strict=True):
        assert (old[mask & ~kept] != 0).any(), "the test would prove nothing"
        assert torch.equal(new, old * staying)
    weight.keep(select.top_k(weight.W.abs(), 9, among=weight.mask))
    order = torch.sort((values * staying).abs().reshape(-1), stable=True, descending=True).indices
    assert weight.active_indices.tolist() == order[:9].sort().values.tolist()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adadelta"])
def test_connections_exchanged_by_position_have_fresh_optimizer_state_and_others_keep_theirs(name, layout):
    callback = RigL(0.5, update_every=10**9)
    module = by_hand(callback, OPTIMIZERS[name], 5, seeded(cnn).to(memory_format=layout))
    weight = callback._weights["4.weight"]
    assert module[4].weight.is_contiguous(memory_format=layout)
    before = {key: state.clone() for key, state in optimizer_state(weight)}
    values, mask = weight.W.clone(), weight.mask.clone()
    dropped = mask.reshape(-1).nonzero()[3:10, 0]
    grown = (~mask).reshape(-1).nonzero()[5:14, 0]
    weight.rewire(dropped, grown, torch.arange(1.0, 10.0))
    # where a position is, in any layout: the index that reshape(-1) gives it
    changed = torch.zeros(weight.shape, dtype=torch.bool)
    for position in (*dropped.tolist(), *grown.tolist()):
        changed[tuple(torch.unravel_index(torch.tensor(position), weight.shape))] = True
    assert len(before) == {"Adam": 3, "AdamW": 2, "RMSprop": 3, "Adadelta": 2}[name]
    for key, new in optimizer_state(weight):
        old = before[key]
        assert (old[changed] != 0).any(), "the test would prove nothing"
        assert not new[changed & ~weight.mask].any()
        assert (new[changed & weight.mask] > 0).all() if key in SCALES else not new[changed].any()
        assert torch.equal(new[~changed], old[~changed])
    assert torch.equal(weight.mask, mask ^ changed)
    assert weight.W.reshape(-1)[grown].tolist() == list(range(1, 10))
    assert not weight.W.reshape(-1)[dropped].any()
    assert torch.equal(weight.W[~changed], values[~changed])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adadelta"])
@pytest.mark.parametrize("method", ["RigL", "SET", "GGR", "ITOP", "DeepR"])
def test_what_a_method_grows_has_no_momentum_and_the_scale_of_its_neuron(method, name, layout):
    options = {"l1": 5e-3, "temperature": 0.0} if method == "DeepR" else {"update_every": 10**9}
    callback = MASKED[method](sparsity=0.5, **options)
    module = by_hand(callback, OPTIMIZERS[name], 5, seeded(cnn).to(memory_format=layout))
    before = {weight.name: weight.mask.clone() for weight in callback._weights.values()}
    optimizer = next(iter(callback._weights.values())).optimizer
    if method == "DeepR":  # moves after the optimizer's step
        step(callback, optimizer, module, torch.randn(5, 12))
    else:
        module(torch.randn(5, 12)).square().sum().backward()
        callback.update(list(callback._weights.values()), 0.3, 1.0)
    for weight in callback._weights.values():
        changed = weight.mask ^ before[weight.name]
        assert changed.any() or weight.name != "4.weight"
        grown, others = changed & weight.mask, weight.mask & ~changed
        for key, state in optimizer_state(weight):
            assert state[others].any()
            assert not state[changed & ~grown].any()
            if key not in SCALES:
                assert not state[grown].any()
                continue
            for row, new, old in zip(state, grown, others, strict=True):
                mean = row[old].mean() if old.any() else state[others].mean()
                torch.testing.assert_close(row[new], mean.expand(int(new.sum())))


def test_state_of_inactive_weights_is_0_under_the_usual_optimizers():
    for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adadelta", "NAdam", "RAdam"):
        callback = SET(0.8, update_every=10**9)
        by_hand(callback, OPTIMIZERS[name], 5)
        for weight in callback._weights.values():
            assert all(not state[~weight.mask].any() for _, state in optimizer_state(weight)), name


def test_state_of_new_connections_is_where_their_optimizer_begins():
    layer = SparseLinear(12, 7, 30, generator=torch.Generator().manual_seed(0))
    sparse = SparseWeight("weight", (7, 12), layer)
    masked = MaskedWeight("weight", sparse.mask, nn.Parameter(layer.dense_weight()))
    dropped, grown = sparse.active_indices[3:9], (~sparse.mask).flatten().nonzero()[::9, 0]
    for weight in (sparse, masked):
        weight.optimizer = torch.optim.Rprop([weight.parameter], lr=0.02)
        for _ in range(3):
            weight.parameter.grad = torch.rand_like(weight.parameter) + 1
            weight.optimizer.step()
        weight.rewire(dropped, grown)
    state, values = (dict(optimizer_state(weight))["step_size"] for weight in (masked, sparse))
    assert state.view(-1)[grown].tolist() == pytest.approx([0.02] * len(grown))
    assert torch.isin(sparse.active_indices, grown).sum() == len(grown)
    assert values[torch.isin(sparse.active_indices, grown)].tolist() == pytest.approx([0.02] * len(grown))
    assert (values[~torch.isin(sparse.active_indices, grown)] > 0.02).all(), "the others keep theirs"


class Notes(pl.Callback):
    """Keep parameters and momentum after each step."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        momentum = [state["momentum_buffer"] for state in trainer.optimizers[0].state.values()]
        self.seen.append(copy.deepcopy((pl_module.state_dict(), momentum, dict(self.callback.masks))))


def test_the_step_in_which_rigl_moves_connections_applies_no_update():
    callback = RigL(0.8, update_every=7, stop_at=1.0, decay="none")
    notes = Notes(callback)
    _, run = fit([callback, notes], max_epochs=1)
    assert run.global_step == 30
    moved = 0
    for i in range(1, 30):
        (before, momentum, masks), (after, momentum_after, masks_after) = notes.seen[i - 1], notes.seen[i]
        same_masks = all(torch.equal(masks[name], masks_after[name]) for name in masks)
        if i % 7:
            assert same_masks
            assert not torch.equal(before["net.0.bias"], after["net.0.bias"])
            continue
        moved += not same_masks
        for name, value in before.items():
            kept = masks[name] & masks_after[name] if name in masks else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(value[kept], after[name][kept]), "no update"
            assert not after[name][~kept].any() or name not in masks
        for name, old, new in zip(before, momentum, momentum_after, strict=True):
            kept = masks[name] & masks_after[name] if name in masks else torch.ones_like(old, dtype=torch.bool)
            assert torch.equal(old[kept], new[kept])
            assert not new[~kept].any() or name not in masks
    assert moved == 4


def test_a_gradient_scaler_of_a_fused_optimizer_gets_its_gradients_in_that_step_too():
    callback, plain = (RigL(0.8, update_every=7, stop_at=1.0) for _ in range(2))
    build = lambda fused: Lit(optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=fused))  # noqa: E731
    module, _ = fit(callback, seeded(lambda: build(True)), plugins=[Unmixed(Scaler())])
    other, _ = fit(plain, seeded(lambda: build(False)))
    assert all(torch.equal(mask, plain.masks[name]) for name, mask in callback.masks.items())
    for name, p in module.named_parameters():
        assert torch.allclose(p, other.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_clipping_by_norm_counts_the_gradients_of_active_weights_alone():
    seen = []

    class Clips(Lit):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            seen.append({name: p.grad.clone() for name, p in self.named_parameters()})

    callback = SET(0.8, update_every=None)
    fit(callback, seeded(Clips), max_epochs=1)
    for gradients in seen:
        for name, mask in callback.masks.items():
            assert not gradients[name][~mask].any()
            assert gradients[name][mask].any()


def test_moving_waits_while_gradients_are_not_finite():
    class Overflows(Lit):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx in (7, 8) else loss

    callback = RigL(0.8, update_every=7, stop_at=1.0, decay="none")
    looks = Watch(callback)
    scaler = Scaler()
    fit([callback, looks], seeded(Overflows), plugins=[Unmixed(scaler)], max_epochs=1)
    assert scaler.skipped == 2
    changes = [
        i
        for i in range(1, 30)
        if any(not torch.equal(looks.masks[i][n], looks.masks[i - 1][n]) for n in callback.masks)
    ]
    assert changes == [9, 14, 21, 28]


def test_the_same_seed_draws_the_same_masks_and_another_draws_others():
    def drawn(**options):
        callback = SET(0.8, **options)
        fit(callback, seeded(Lit), max_epochs=1)
        return callback.masks["net.0.weight"]

    assert torch.equal(drawn(), drawn())
    assert torch.equal(drawn(seed=3), drawn(seed=3))
    assert not torch.equal(drawn(seed=3), drawn(seed=4))
    callback = SET(0.8)
    fit(callback, seeded(Lit, 5), max_epochs=1)
    assert not torch.equal(drawn(), callback.masks["net.0.weight"]), "by default the run's seed decides"


def test_drawing_masks_leaves_the_runs_own_random_numbers_alone():
    after = []
    for callbacks in ([], [SET(0.8, update_every=5)]):
        fit(callbacks, seeded(Lit), max_epochs=1)
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_a_mask_once_read_does_not_change():
    callback = SET(0.8, update_every=5)
    kept = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, *args):
            mask = callback.masks["net.0.weight"]
            kept.append((mask, mask.clone()))

    fit([callback, Reads()], max_epochs=1)
    assert all(torch.equal(mask, copied) for mask, copied in kept)
    assert not torch.equal(kept[0][0], kept[-1][0])


def test_a_layer_without_a_gradient_keeps_its_connections():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(12, 4), nn.Linear(12, 4)

        def forward(self, x):
            return self.used(x)

    class Looks(pl.Callback):
        def on_train_start(self, *args):
            masks.append(callback.masks)

    masks, callback = [], RigL(0.5, update_every=3)
    fit([callback, Looks()], seeded(lambda: Lit(Skips())), max_epochs=1)
    assert torch.equal(masks[0]["net.unused.weight"], callback.masks["net.unused.weight"])
    assert not torch.equal(masks[0]["net.used.weight"], callback.masks["net.used.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be below 1, got 1.0"),
        ({"sparsity": -0.1}, "sparsity must be a number from 0 to 1, got -0.1"),
        ({"sparsity": 90}, "sparsity must be a number from 0 to 1, got 90"),
        ({"distribution": "random"}, r"distribution must be one of \['er', 'erk', 'uniform', 'uniform_first_dense'\]"),
        ({"distribution": {"net.*": 2}}, "distribution must be a number from 0 to 1, got 2"),
        ({"min_layer_density": 2}, "min_layer_density must be a number from 0 to 1, got 2"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"drop_fraction": 0}, "drop_fraction must be above 0, got 0"),
        ({"drop_fraction": 1.5}, "drop_fraction must be a number from 0 to 1, got 1.5"),
        ({"update_every": 0}, "update_every must be an integer of at least 1, got 0"),
        ({"decay": "fast"}, "decay must be one of .*'cosine'"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        RigL(**{"sparsity": 0.8, **arguments})


def test_methods_with_an_end_need_to_know_how_long_the_training_is():
    for build in (RigL, SET):
        with pytest.raises(Exception, match=f"{build.__name__}.* must know how long the training is.*max_epochs"):
            fit(build(0.8), max_epochs=-1, max_time={"seconds": 20})


def test_a_training_too_short_to_move_anything_is_warned_of():
    with pytest.warns(UserWarning, match="RigL.* will move no connection: .*Lower update_every"):
        fit(RigL(0.8, update_every=30), max_epochs=1)
    with pytest.warns(UserWarning, match="SET.* will move no connection"):
        fit(SET(0.8, update_every=None), max_epochs=1)


def test_checkpoint_holds_masks_as_booleans(tmp_path):
    callback = SET(0.8)
    _, run = fit(callback, max_epochs=1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert isinstance(callback, MaskedCallback)
    assert all(weight["mask"].dtype == torch.bool for weight in state["weights"].values())


def test_channels_last_weights_keep_their_layout_and_their_sparsity():
    module = seeded(lambda: Lit(cnn()))
    module.net[4].to(memory_format=torch.channels_last)
    callback = RigL(0.8, update_every=4)
    fit(callback, module, loader())
    assert module.net[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert callback.masks["net.4.weight"].stride() == module.net[4].weight.stride()
    assert sum(int(mask.sum()) for mask in callback.masks.values()) == round(
        0.2 * sum(mask.numel() for mask in callback.masks.values())
    )
