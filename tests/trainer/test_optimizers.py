"""Parameter groups, schedules, clipping and odd losses train as the autograd reference does."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import REPRESENTATIVES, SETTINGS, THRESHOLDS, Lit, effective, fit, loader, same, seeded, state, trainer
from reference_training import Grouped, check, double, mean_loss, reference_groups, sgd, train, train_reference
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_sparse import STR


@pytest.fixture(params=SETTINGS)
def method(request):
    return request.param


@pytest.mark.parametrize("method", THRESHOLDS)
def test_thresholds_share_the_group_of_their_weight(method):
    callback = SETTINGS[method]()
    _, run = train(callback, seeded(lambda: Grouped(double())))
    groups = run.optimizers[0].param_groups
    assert len(groups) == 2, "no group of their own, which schedulers and checkpoints would have to know"
    per_weight = len(callback.threshold_names)
    assert [len(group["params"]) for group in groups] == [2 + per_weight, 4 + 2 * per_weight]
    check(callback, train_reference(method, reference_groups))


@pytest.mark.parametrize("method", THRESHOLDS)
def test_learning_rate_schedules_reach_thresholds_in_every_group(method):
    class Scheduled(Grouped):
        @staticmethod
        def schedule(optimizer):
            return {"scheduler": StepLR(optimizer, 10, 0.3), "interval": "step"}

    callback = SETTINGS[method]()
    train(callback, seeded(lambda: Scheduled(double())))
    check(callback, train_reference(method, reference_groups, schedule=lambda o: StepLR(o, 10, 0.3)))


@pytest.mark.parametrize("method", THRESHOLDS)
def test_one_cycle_trains_as_the_reference(method):
    def cycle(optimizer):
        return OneCycleLR(optimizer, max_lr=0.2, total_steps=31)

    class Cycled(Lit):
        def configure_optimizers(self):
            optimizer = sgd(self.parameters())
            return [optimizer], [{"scheduler": cycle(optimizer), "interval": "step"}]

    callback = SETTINGS[method]()
    train(callback, seeded(lambda: Cycled(double())))
    check(callback, train_reference(method, lambda r: sgd(r.trained()), schedule=cycle))


@pytest.mark.parametrize("method", THRESHOLDS)
def test_reduce_on_plateau_lowers_the_one_learning_rate_that_weights_and_thresholds_have(method):
    class Plateau(Lit):
        def configure_optimizers(self):
            optimizer = sgd(self.parameters())
            scheduler = ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "flat"}}

        def training_step(self, batch, batch_idx):
            self.log("flat", 1.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    class Moves(pl.Callback):
        def __init__(self):
            self.ends = []

        def on_train_epoch_end(self, *args):
            self.ends.append({name: t.clone() for name, t in callback.thresholds.items()})

    callback, moves = SETTINGS[method](), Moves()
    _, run = train([callback, moves], seeded(lambda: Plateau(double())), max_epochs=6)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**5)
    for name in callback.thresholds:
        early, late = ((moves.ends[i + 1][name] - moves.ends[i][name]).abs().max() for i in (0, 4))
        assert late < 0.02 * early


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("method", THRESHOLDS)
def test_gradient_clipping_takes_weights_and_thresholds_together(method, algorithm):
    limit = 0.1 if algorithm == "norm" else 0.01
    clip = nn.utils.clip_grad_norm_ if algorithm == "norm" else nn.utils.clip_grad_value_
    callback = SETTINGS[method]()
    train(
        callback,
        seeded(lambda: Lit(double())),
        max_epochs=2,
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
    )
    kwargs = {"clip": lambda parameters: clip(parameters, limit), "epochs": 2}
    check(callback, train_reference(method, lambda r: sgd(r.trained()), **kwargs))


@pytest.mark.parametrize("shape", [torch.sqrt, torch.exp, torch.sigmoid])
@pytest.mark.parametrize("method", THRESHOLDS)
def test_losses_whose_value_is_needed_for_backward(method, shape):
    class Shaped(Lit):
        def training_step(self, batch, batch_idx):
            return shape(super().training_step(batch, batch_idx))

    callback = SETTINGS[method]()
    train(callback, seeded(lambda: Shaped(double())))
    loss = lambda call, x, y: shape(mean_loss(call, x, y))  # noqa: E731
    check(callback, train_reference(method, lambda r: sgd(r.trained()), loss=loss))


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_a_complex_parameter_trains_beside_the_weights(method):
    class Complex(Lit):
        def __init__(self, **options):
            super().__init__(**options)
            self.factor = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, x):
            return super().forward(x) * self.factor.abs()

    callback = SETTINGS[method]()
    module, _ = fit(callback, seeded(Complex), max_epochs=2)
    assert effective(module, callback)
    assert (module.factor != 1).all()


@pytest.mark.skipif(not hasattr(torch.optim.Optimizer, "_process_value_according_to_param_policy"), reason="old torch")
@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_optimizers_of_named_parameters_name_the_thresholds_too(method, tmp_path):
    class Named(Lit):
        def configure_optimizers(self):
            return sgd(self.named_parameters())

    try:
        sgd(Named().named_parameters())
    except TypeError:
        pytest.skip("this torch takes no named parameters")
    named, plain = SETTINGS[method](), SETTINGS[method]()
    _, run = fit(named, seeded(Named), max_epochs=1)
    fit(plain, max_epochs=1)
    (group,) = run.optimizers[0].param_groups
    assert len(group["params"]) == len(group["param_names"])
    assert method not in THRESHOLDS or "net.0.weight.t" in group["param_names"]
    assert same(state(plain), state(named))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = SETTINGS[method]()
    trainer(again, max_epochs=2).fit(seeded(Named), loader(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_lbfgs_is_refused(method):
    module = seeded(lambda: Lit(optimizer=lambda p: torch.optim.LBFGS(p)))
    with pytest.raises(Exception, match=f"{method}.* cannot train with LBFGS.*Use a first-order optimizer"):
        fit(SETTINGS[method](), module)


def test_an_optimizer_that_outlives_a_fit_takes_thresholds_once():
    class Keeps(Lit):
        def __init__(self):
            super().__init__()
            self.kept = sgd(self.parameters())

        def configure_optimizers(self):
            return self.kept

    module, callback = seeded(Keeps), STR(-2.5)
    for _ in range(3):
        fit(callback, module, max_epochs=1)
        assert len(module.kept.param_groups[0]["params"]) == 6 + 3


class Cautious(torch.optim.SGD):
    """Has the mark of timm's optimizers."""

    def __init__(self, parameters, caution):
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            group["caution"] = caution


@pytest.mark.parametrize("caution", [True, False])
def test_optimizers_whose_steps_grow_with_zeros_are_warned_of(caution, recwarn):
    fit(SETTINGS["RigL"](), Lit(optimizer=lambda p: Cautious(p, caution)), max_epochs=1)
    found = [str(warning.message) for warning in recwarn if "is cautious" in str(warning.message)]
    assert len(found) == caution
    assert not found or "Use caution=False, or multiply lr by the density" in found[0]
