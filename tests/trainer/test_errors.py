"""Bad input is refused with a message that names it and says what to do; trouble on the way is told once."""

import warnings
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from averaging import EMAWeightAveraging
from helpers import REPRESENTATIVES, SETTINGS, THRESHOLDS, Lit, Recurrent, effective, fit, seeded
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import prune

from lightning_sparse import DFBST, DST, GMP, SET, SNIP, STR, AutoSparse, RandomPruning, RigL
from lightning_sparse.trainer import guards

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=SETTINGS)
def method(request):
    return request.param


def told(caught, text):
    return [str(warning.message) for warning in caught if text in str(warning.message)]


# ---------------------------------------------------------------------- at construction


@pytest.mark.parametrize("value", [-1e-9, NAN, INF, -INF, "5e-4", True])
@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda v: DST(alpha=v), "alpha"),
        (lambda v: DFBST(alpha=v, beta=0.1), "alpha"),
        (lambda v: DFBST(alpha=0.1, beta=v), "beta"),
        (lambda v: AutoSparse(decay_rate=v), "decay_rate"),
    ],
)
def test_a_negative_or_not_finite_hyper_parameter_is_refused(build, argument, value):
    message = rf"^{argument} must be a finite number of at least 0, got {value!r}\. .+"
    if argument == "alpha" and value is None:  # left out: then there must be a sparsity
        message = r"takes either alpha or sparsity, got alpha=None and sparsity=None\. .+"
    with pytest.raises(ValueError, match=message):
        build(value)


@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, INF, "0.5"])
@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda v: AutoSparse(alpha=v), "alpha"),
        (lambda v: AutoSparse(backward_density=v), "backward_density"),
        (lambda v: DST(0.1, reset_above=v), "reset_above"),
        (lambda v: DFBST(0.1, 0.1, reset_above=v), "reset_above"),
    ],
)
def test_a_share_outside_of_0_to_1_is_refused(build, argument, value):
    with pytest.raises(ValueError, match=rf"^{argument} must be a number from 0 to 1, got {value!r}\. .+"):
        build(value)


@pytest.mark.parametrize("value", [NAN, INF, -INF, "x"])
@pytest.mark.parametrize("build", [lambda v: AutoSparse(init_threshold=v), STR])
def test_an_initial_threshold_that_is_not_finite_is_refused(build, value):
    with pytest.raises(ValueError, match=r"^init_threshold must be a finite number"):
        build(value)


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda v: AutoSparse(alpha_zero_epoch=v), "alpha_zero_epoch"),
        (lambda v: DFBST(0.1, 0.1, penalty_from_epoch=v), "penalty_from_epoch"),
        (lambda v: DST(0.1, log_every_n_steps=v), "log_every_n_steps"),
    ],
)
def test_a_count_that_is_no_count_is_refused(build, argument, value):
    with pytest.raises(ValueError, match=rf"^{argument} must be an integer of at least \d, got {value!r}"):
        build(value)


def test_an_unknown_decay_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^decay must be one of \['cosine', .*'sigmoid_cosine'\], got 'quadratic'"):
        AutoSparse(decay="quadratic")


@pytest.mark.parametrize("method", THRESHOLDS)
def test_an_unknown_granularity_is_refused(method):
    with pytest.raises(ValueError, match=r"^granularity must be one of \['layer', 'neuron', 'weight'\], got 'row'"):
        SETTINGS[method](granularity="row")


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_patterns_that_are_no_list_are_refused(method):
    for argument in ("include", "exclude"):
        with pytest.raises(ValueError, match=rf"^{argument} must be a list of glob patterns .*got 'net\.\*'"):
            SETTINGS[method](**{argument: "net.*"})
        with pytest.raises(ValueError, match=rf"^{argument} must be a list of glob patterns .*got \[1\]"):
            SETTINGS[method](**{argument: [1]})


# ---------------------------------------------------------------------- at the start of fit


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_nothing_to_make_sparse_is_refused_with_the_reasons(method):
    module = seeded(Lit)
    for p in module.parameters():
        p.requires_grad_(p.ndim == 1)
    with pytest.raises(MisconfigurationException, match=rf"(?s){method}.* found nothing.*frozen.*include=") as error:
        fit(SETTINGS[method](), module)
    assert "net.0.weight" in str(error.value)
    with pytest.raises(MisconfigurationException, match="found nothing to make sparse"):
        fit(SETTINGS[method](include=[]))


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_weights_in_no_optimizer_are_refused(method):
    module = seeded(lambda: Lit(optimizer=lambda p: torch.optim.SGD([q for q in p if q.ndim == 1], lr=0.1)))
    with pytest.raises(MisconfigurationException, match=r"no optimizer owns any .*net.0.weight.*configure_optimizers"):
        fit(SETTINGS[method](), module)


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_a_weight_in_no_optimizer_stays_dense_beside_others_that_are(method):
    module = seeded(lambda: Lit(optimizer=lambda p: torch.optim.SGD(list(p)[:4], lr=0.1, weight_decay=1e-3)))
    callback = SETTINGS[method]()
    before = module.net[4].weight.detach().clone()
    fit(callback, module, max_epochs=1)
    assert set(callback.masks) == {"net.0.weight", "net.2.weight"}
    assert torch.equal(module.net[4].weight, before)


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_a_weight_in_two_optimizers_is_refused(method):
    class Twice(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.net[2].parameters(), 0.1)

    with pytest.raises(MisconfigurationException, match=r"net.2.weight is in 2 optimizers .* exclude"):
        fit(SETTINGS[method](), seeded(Twice))


@pytest.mark.parametrize("method", THRESHOLDS)
def test_finetuning_callbacks_are_refused_by_methods_with_thresholds(method):
    module = seeded(Lit)
    module.backbone = module.net
    with pytest.raises(MisconfigurationException, match=rf"{method}.* .*BaseFinetuning.*add_param_group"):
        fit([SETTINGS[method](), BackboneFinetuning()], module)


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_optimizers_that_are_exchanged_during_the_fit_are_refused(method):
    class Exchanges(Lit):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    module, callback = seeded(Exchanges), SETTINGS[method]()
    with pytest.raises(MisconfigurationException, match=rf"have been exchanged .*{method}.* acts in .*another fit"):
        fit(callback, module)
    assert effective(module, callback)


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_a_weight_that_is_replaced_during_the_fit_is_refused(method):
    class Replaces(Lit):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[2] = nn.Linear(16, 10)
                self.optimizers().optimizer.add_param_group({"params": list(self.net[2].parameters())})

    with pytest.raises(MisconfigurationException, match=rf"net\.2\.weight became another parameter .*{method}.* would"):
        fit(SETTINGS[method](), seeded(Replaces))


@pytest.mark.parametrize("method", [*REPRESENTATIVES, "FixedMask"])
def test_a_weight_that_torch_prunes_is_refused_with_the_remedy(method):
    module = seeded(Lit)
    prune.l1_unstructured(module.net[2], "weight", 0.5)
    with pytest.raises(MisconfigurationException, match=r"masks net\.2\.weight, .*remove\(.*'net\.2'\), 'weight'\)"):
        fit(SETTINGS[method](), module)
    if method != "SNIP":  # its probe is a copy, which a weight that was computed cannot have
        fit(SETTINGS[method](exclude=["net.2.weight_orig"]), module, max_steps=2, max_epochs=1)
    prune.remove(module.net[2], "weight")
    fit(SETTINGS[method](), module, max_steps=2, max_epochs=1)


def test_a_recurrent_weight_that_torch_prunes_is_refused():
    module = seeded(lambda: Lit(Recurrent()))
    prune.random_unstructured(module.net.lstm, "weight_hh_l1", 0.5)
    with pytest.raises(MisconfigurationException, match=r"masks net\.lstm\.weight_hh_l1, .*'weight_hh_l1'\)"):
        fit(SETTINGS["RigL"](), module)


class OutOfReach(pl.Callback):
    """Keeps an average somewhere."""


Elsewhere = type("ElsewhereAveraging", (type("WeightAveraging", (OutOfReach,), {}),), {})


@pytest.mark.parametrize("kind", [partial(StochasticWeightAveraging, 0.1), EMAWeightAveraging, Elsewhere])
@pytest.mark.parametrize(("build", "moves"), [(DST, 1), (SET, 1), (RandomPruning, 0), (SNIP, 0)])
def test_averages_out_of_reach_are_told_to_be_denser_where_connections_move(kind, build, moves):
    average = kind()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([build(0.5), average], max_epochs=1)
    out_of_reach = isinstance(average, OutOfReach)
    assert len(told(caught, f"{type(average).__name__} averages weights of several steps")) == moves * out_of_reach


class ZeroRedundancyOptimizer(torch.optim.SGD):
    """Named as torch's, which needs a process group."""


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_sharded_optimizers_are_refused(method):
    module = seeded(lambda: Lit(optimizer=lambda p: ZeroRedundancyOptimizer(p, lr=0.1)))
    with pytest.raises(MisconfigurationException, match=rf"{method}.* needs every process to make the same update"):
        fit(SETTINGS[method](), module)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="old torch")
def test_thresholds_are_refused_by_an_optimizer_that_takes_matrices_alone():
    module = seeded(lambda: Lit(optimizer=lambda p: torch.optim.Muon([q for q in p if q.ndim == 2])))
    with pytest.raises(MisconfigurationException, match=r"DST.* trains thresholds, .* Muon takes .*net\.0\.weight,"):
        fit(SETTINGS["DST"](), module)
    fit(SETTINGS["TopKAST"](), module, max_steps=2)


def test_layers_without_a_shape_are_refused_by_name():
    module = seeded(lambda: Lit(nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 4))))
    with pytest.raises(ValueError, match=r"net\.0\.weight \(LazyLinear\) must have a shape .*Run an example through"):
        fit(SETTINGS["SET"](), module)
    module(torch.ones(1, 12))
    fit(SETTINGS["SET"](), module, max_steps=2)


def test_embeddings_with_sparse_gradients_are_refused_by_name_if_asked_for():
    class Words(Lit):
        def forward(self, x):
            return self.net((x.abs() * 9).long() % 20).mean(1)

    def module():
        net = nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Linear(8, 4))
        return seeded(lambda: Words(net, lambda p: torch.optim.SGD(p, lr=0.1)))

    with pytest.raises(ValueError, match=r"net\.0\.weight \(Embedding\) must have dense .*sparse=False, or .*exclude"):
        fit(SETTINGS["SET"](include=["*.weight"]), module())
    fit(SETTINGS["SET"](), module(), max_steps=2)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy.__new__(FSDPStrategy), "FSDPStrategy may split them.*strategy='ddp'"),
        (DDPStrategy(model_averaging_period=4), "model averaging"),
    ],
    ids=["FSDP", "model averaging"],
)
@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_strategies_that_split_weights_or_updates_are_refused(method, strategy, message):
    """Checked on the strategy alone: to run one takes accelerators."""
    run = SimpleNamespace(strategy=strategy, optimizers=[], callbacks=[], ckpt_path=None)
    with pytest.raises(MisconfigurationException, match=message):
        guards.refuse_trainer(SETTINGS[method](), run)


@pytest.mark.parametrize("decay", ["linear", "cosine", "sigmoid", "sigmoid_cosine"])
def test_a_decay_over_epochs_needs_their_number(decay):
    with pytest.raises(MisconfigurationException, match=rf"decay='{decay}' needs the number of epochs.*max_epochs"):
        fit(AutoSparse(decay=decay), max_epochs=-1, max_time={"seconds": 20})


@pytest.mark.parametrize("decay", ["none", "exponential"])
def test_other_decays_do_not(decay):
    callback = AutoSparse(decay=decay)
    fit(callback, max_epochs=-1, max_steps=5, limit_train_batches=3)
    assert callback.density > 0


@pytest.mark.parametrize("build", [AutoSparse, lambda: STR(-5)])
def test_no_weight_decay_is_warned_of_where_it_alone_drives_sparsity(build):
    module = seeded(lambda: Lit(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)))
    with pytest.warns(UserWarning, match=r"no weight decay: nothing drives net.0.weight .*Set weight_decay"):
        fit(build(), module, max_epochs=1)


def test_no_weight_decay_is_no_trouble_for_the_others():
    for build in (lambda: DST(0.1), lambda: DFBST(0.1, 0.1)):
        module = seeded(lambda: Lit(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(build(), module, max_epochs=1)
        assert told(caught, "weight decay") == []


# ---------------------------------------------------------------------- while training


class Explodes(Lit):
    """Its loss is not finite in a few batches of each epoch."""

    value = NAN

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.value if batch_idx in (11, 12) else loss


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("method", THRESHOLDS)
def test_gradients_that_are_not_finite_leave_thresholds_finite_and_are_told_of_once(method, value, clip):
    module = seeded(Explodes)
    module.value = value
    callback = SETTINGS[method]()
    clipping = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": clip} if clip else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callback, module, max_epochs=3, **clipping)
    assert len(told(caught, "Gradients were not finite")) == 1
    for t in callback.thresholds.values():
        assert torch.isfinite(t).all()
    if method == "DFBST":
        assert all(torch.isfinite(t).all() for t in callback.backward_thresholds.values())
    assert torch.isnan(module.net[0].weight).any(), "the user must see what happened to the weights"


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_finite_gradients_are_not_told_of(method):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(SETTINGS[method]())
    assert told(caught, "not finite") == []


@pytest.mark.parametrize("build", [lambda: DST(50.0, reset_above=None), lambda: DFBST(50.0, 0.1, reset_above=None)])
def test_a_layer_without_any_weight_left_is_told_of_by_name_once(build):
    callback = build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callback, max_epochs=3)
    assert callback.density == 0
    for name in callback.masks:
        assert len(told(caught, f"{name} has no weight left: density 0 after epoch 0")) == 1
        assert len(told(caught, f"{name} has no weight left")) == 1


class Residual(nn.Module):
    """A block whose shortcut is a 1 x 1 convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1, bias=False)

    def forward(self, x):
        return torch.relu(self.conv(x) + self.shortcut(x))


@pytest.mark.parametrize("build", [lambda: STR(-2.5), lambda: GMP(0.5, update_every=2)])
def test_a_shortcut_without_any_weight_left_is_told_of_by_name(build):
    net = seeded(lambda: nn.Sequential(nn.Unflatten(1, (3, 2, 2)), Residual(), nn.Flatten(), nn.Linear(32, 4)))
    net[1].shortcut.weight.data.mul_(1e-6)  # below any threshold from the first
    callback = build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callback, Lit(net, lambda p: torch.optim.SGD(p, lr=0.0, weight_decay=1e-9)), max_epochs=1)
    name = "net.1.shortcut.weight"
    assert callback.layer_density[name] == 0
    assert told(caught, "no weight left") == [f"{name} has no weight left: density 0 after epoch 0."]


@pytest.mark.parametrize("build", [lambda: DST(50.0), lambda: DFBST(50.0, 0.1)])
def test_a_layer_that_collapsed_and_was_reset_is_told_of_by_name_once(build):
    callback = build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callback, max_epochs=3)
    for name in callback.masks:
        (message,) = told(caught, f"{name} collapsed: over 99% of it was masked")
        assert "smaller alpha" in message
    assert all(density > 0.01 for density in callback.layer_density.values())


@pytest.mark.parametrize("method", [RigL, DST])
def test_a_step_that_is_captured_in_a_graph_is_refused(method, monkeypatch):
    callback = method(0.5)
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with pytest.raises(MisconfigurationException, match=f"{method.__name__}.* cannot be captured in a CUDA graph"):
        fit(callback)
