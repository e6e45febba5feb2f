"""LatentCallback as a base: methods without thresholds, optimizers that move storage, gradients that are replaced."""

import pytest
import torch
from helpers import Lit, StopsAfter, fit, loader, mlp, saved, seeded, trainer

from lightning_sparse import DFBST, DST, STR, AutoSparse
from lightning_sparse.families.latent import LatentCallback

METHODS = {
    "DST": lambda: DST(alpha=5e-3),
    "DFBST": lambda: DFBST(alpha=5e-3, beta=0.5),
    "AutoSparse": lambda: AutoSparse(alpha=0.6, init_threshold=-2.5),
    "STR": lambda: STR(init_threshold=-2.5),
}


@pytest.fixture(params=METHODS)
def build(request):
    return METHODS[request.param]


class HalfOfEachRow(LatentCallback):
    """Computes with the larger half of each row; has no thresholds."""

    def effective(self, weight, W, out):
        kept = W.abs().topk(W.shape[1] // 2).indices
        out.zero_().scatter_(1, kept, W.gather(1, kept))

    def gradients(self, weight, dP, W):
        pass


def test_a_method_may_have_no_thresholds(tmp_path):
    whole, resumed = HalfOfEachRow(), HalfOfEachRow()
    module, run = fit(whole, max_epochs=2)
    assert len(run.optimizers[0].param_groups[0]["params"]) == 6, "nothing joins the optimizer"
    assert not hasattr(whole, "thresholds")
    for name, W in whole.latents.items():
        assert (module.get_parameter(name) != 0).sum(1).tolist() == [W.shape[1] // 2] * len(W)
        assert W.all()

    _, run = fit([HalfOfEachRow(), StopsAfter()], max_epochs=2)
    saved(run, tmp_path / "half.ckpt")
    trainer(resumed, max_epochs=2).fit(seeded(Lit, 9), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(W, resumed.latents[name]) for name, W in whole.latents.items())


def moved(parameters):
    """SGD after which every parameter has storage of its own."""

    class Moves(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.data = p.data.clone()
            return loss

    return Moves(parameters, lr=0.1, weight_decay=1e-3)


def replaced(parameters):
    """SGD that gives its parameters other gradients of the same values."""

    class Replaces(torch.optim.SGD):
        def step(self, closure=None):
            def other():
                loss = closure()
                for group in self.param_groups:
                    for p in group["params"]:
                        p.grad = None if p.grad is None else p.grad.clone()
                return loss

            return super().step(other)

    return Replaces(parameters, lr=0.1, weight_decay=1e-3)


@pytest.mark.parametrize("optimizer", [moved, replaced])
def test_optimizers_may_give_thresholds_new_storage_or_gradients(build, optimizer):
    plain, other = build(), build()
    fit(plain, seeded(lambda: Lit(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-3))))
    fit(other, seeded(lambda: Lit(optimizer=optimizer)))
    assert plain.sparsity > 0.02
    assert all(torch.equal(t, other.thresholds[name]) for name, t in plain.thresholds.items())
    assert all(torch.equal(W, other.latents[name]) for name, W in plain.latents.items())


def test_a_weight_without_gradient_stays_and_so_do_its_thresholds_unless_a_penalty_moves_them(build):
    class Partly(Lit):
        def training_step(self, batch, batch_idx):
            return self.net[:3](batch[0]).square().mean()

    callback = build()
    module = seeded(Partly)
    before = module.net[4].weight.detach().clone()
    fit(callback, module, max_epochs=1)
    assert torch.equal(callback.latents["net.4.weight"], before)
    penalised = isinstance(callback, (DST, DFBST))
    start = 0.0 if penalised else -2.5
    assert (callback.thresholds["net.4.weight"] == start).all() != penalised
    assert (callback.thresholds["net.0.weight"] != start).all()


def test_weights_of_two_dtypes_train_together(build):
    class Mixed(Lit):
        def __init__(self):
            super().__init__(mlp())
            self.net[4].double()

        def forward(self, x):
            return self.net[4](self.net[:4](x).double())

    callback = build()
    module, _ = fit(callback, seeded(Mixed))
    assert {t.dtype for t in callback.thresholds.values()} == {torch.float32, torch.float64}
    assert callback.sparsity > 0.02
    assert all(torch.equal(module.get_parameter(name) != 0, mask) for name, mask in callback.masks.items())
