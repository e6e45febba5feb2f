"""attach: the same training in a loop of one's own as in a Trainer."""

import loop_ranks
import pytest
import torch
from helpers import HOOKED, REPRESENTATIVES, ROUNDS, SETTINGS, Lit, effective, fit, loader, mlp, same, seeded, state
from lightning.fabric import Fabric
from processes import run_fresh_ranks
from torch import nn

from lightning_sparse import DST, SNIP, SWAT, OneShot, RigL, attach
from lightning_sparse.compat.lightning import MisconfigurationException
from lightning_sparse.layers.sparse import SparseLinear

EPOCHS, EPOCH = 3, 30


def cross_entropy(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def decays(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.7)


def attached(method, module, optimizer=None, **kwargs):
    torch.manual_seed(11)
    settings = {"steps": EPOCHS * EPOCH, "steps_per_epoch": EPOCH, "loss": cross_entropy, "batches": loader()}
    return attach(method, module, optimizer or sgd(module.parameters()), **{**settings, **kwargs})


def run(sparse, module, steps=EPOCHS * EPOCH, begin=0, schedulers=()):
    """Make steps of the training of the tiny classifier, whose epochs all have the same batches."""
    batches = [*loader()]
    for step in range(begin, begin + steps):
        sparse.optimizer.zero_grad()
        cross_entropy(module, batches[step % EPOCH]).backward()
        sparse.optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def train(method, module=None, **kwargs):
    module = module if module is not None else seeded(Lit)
    with attached(method, module, **kwargs) as sparse:
        run(sparse, module)
    return module, sparse


@pytest.mark.parametrize("name", [*SETTINGS, *ROUNDS])
def test_every_method_trains_as_in_a_trainer(name):
    make = {**SETTINGS, **ROUNDS}[name]
    module = seeded(lambda: Lit(scheduler=lambda o: {"scheduler": decays(o), "interval": "step"}))
    torch.manual_seed(11)
    in_trainer = make()
    _, trainer = fit(in_trainer, module, max_epochs=EPOCHS)
    other, in_loop = seeded(Lit), make()
    optimizer = sgd(other.parameters())
    scheduler = decays(optimizer)
    with attached(in_loop, other, optimizer, schedulers=[scheduler]) as sparse:
        run(sparse, other, schedulers=[scheduler])
    assert same(module.state_dict(), other.state_dict())
    assert same(trainer.optimizers[0].state_dict()["state"], optimizer.state_dict()["state"])
    assert same(state(in_trainer), state(in_loop))
    assert effective(other, in_loop)
    assert 0 < sparse.sparsity == in_trainer.sparsity


@pytest.mark.parametrize("name", [*REPRESENTATIVES, *HOOKED, "LotteryTicket"])
def test_a_run_that_is_resumed_ends_as_the_unbroken_one(name, tmp_path):
    make = {**SETTINGS, **ROUNDS}[name]
    whole, unbroken = train(make())
    module = seeded(Lit)
    with attached(make(), module) as sparse:
        run(sparse, module, 40)
        kept = [each.state_dict() for each in (module, sparse.optimizer, sparse)]
    torch.save(kept, path := tmp_path / "kept.pt")
    kept = torch.load(path, weights_only=True)
    resumed = Lit()
    resumed.load_state_dict(kept[0])
    sparse = attached(make(), resumed)
    sparse.load_state_dict(kept[2])
    with sparse:
        sparse.optimizer.load_state_dict(kept[1])
        run(sparse, resumed, EPOCHS * EPOCH - 40, begin=40)
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(state(unbroken.method), state(sparse.method))


def test_a_closure_accumulated_batches_and_fabric_train_the_same():
    batches = [*loader()]

    def by_closure(sparse, module):
        for step in range(EPOCHS * EPOCH):

            def closure(step=step):
                sparse.optimizer.zero_grad()
                loss = cross_entropy(module, batches[step % EPOCH])
                loss.backward()
                return loss

            sparse.optimizer.step(closure)

    expected, first = train(DST(5e-3))
    module = seeded(Lit)
    with attached(DST(5e-3), module) as sparse:
        by_closure(sparse, module)
    assert same(expected.state_dict(), module.state_dict())
    module, optimizer = Fabric(accelerator="cpu", devices=1).setup(own := seeded(Lit), sgd(own.parameters()))
    with attached(DST(5e-3), module, optimizer) as sparse:
        run(sparse, module)
    assert same(expected.state_dict(), module.state_dict())
    assert first.masks.keys() == sparse.masks.keys() == {"net.0.weight", "net.2.weight", "net.4.weight"}


def test_gradients_of_several_batches_make_one_step():
    module = seeded(Lit)
    in_trainer = RigL(0.8, update_every=7)
    torch.manual_seed(11)
    fit(in_trainer, module, accumulate_grad_batches=3, max_epochs=EPOCHS)
    other, batches = seeded(Lit), [*loader()]
    with attached(RigL(0.8, update_every=7), other, steps=EPOCHS * 10, steps_per_epoch=10) as sparse:
        for step in range(EPOCHS * 10):
            sparse.optimizer.zero_grad()
            for batch in batches[step % 10 * 3 : step % 10 * 3 + 3]:
                (cross_entropy(other, batch) / 3).backward()
            sparse.optimizer.step()
    assert same(module.state_dict(), other.state_dict())


def test_layers_that_hold_the_nonzeros_alone():
    module = seeded(Lit)
    torch.manual_seed(11)
    fit(RigL(0.8, update_every=7, storage="sparse"), module, max_epochs=EPOCHS)
    other = seeded(Lit)
    with attached(RigL(0.8, update_every=7, storage="sparse"), other, sgd) as sparse:
        assert isinstance(other.net[0], SparseLinear)
        run(sparse, other)
    theirs = other.state_dict()  # by the kernel that was quicker
    assert all(torch.allclose(x, theirs[name], atol=1e-5) for name, x in module.state_dict().items())
    assert type(other.net[0]) is nn.Linear


@pytest.mark.parametrize("name", ["MemoryEfficientDST", "SynFlow", "DFBST"])
def test_a_module_that_is_one_layer(name):
    module = seeded(lambda: nn.Linear(12, 4))
    with attached(SETTINGS[name](), module) as sparse:
        run(sparse, module, 40)
    assert sparse.masks.keys() == {"weight"}
    assert effective(module, sparse.method)
    assert sparse.sparsity > 0.1


def test_two_optimizers_and_parts_of_a_module():
    module = nn.ModuleDict({"one": mlp(), "two": mlp()})
    optimizers = [sgd(part.parameters()) for part in module.values()]
    method = RigL(0.8, update_every=3)
    with attach(method, module, optimizers, steps=12) as sparse:
        first = {name: mask.clone() for name, mask in sparse.masks.items()}
        for step in range(12):
            for part, optimizer in zip(module.values(), optimizers, strict=True):
                part.zero_grad()
                cross_entropy(part, [*loader()][step]).backward()
                optimizer.step()
    assert sparse.step == 12
    assert {name.split(".")[0] for name, mask in sparse.masks.items() if not torch.equal(mask, first[name])} == {
        "one",
        "two",
    }
    assert effective(module, method)


def test_evaluation_between_steps_changes_nothing():
    expected, _ = train(RigL(0.8, update_every=7))
    module, batches = seeded(Lit), [*loader()]
    with attached(RigL(0.8, update_every=7), module) as sparse:
        for step in range(EPOCHS * EPOCH):
            run(sparse, module, 1, begin=step)
            with torch.no_grad():
                module(batches[0][0])
            module.eval()
            module(batches[0][0])
            module.train()
    assert same(expected.state_dict(), module.state_dict())


def test_an_error_leaves_a_plain_sparse_module():
    module, method = seeded(Lit), DST(5e-3)
    with pytest.raises(IndexError), attached(method, module) as sparse:
        run(sparse, module, 5) or [][0]
    assert effective(module, method)
    assert not module._forward_pre_hooks


def test_copies_of_the_module_are_free():
    import copy

    module = seeded(Lit)
    with attached(RigL(0.8, update_every=2), module) as sparse:
        run(sparse, module, 3)
        copy.deepcopy(module)(next(iter(loader()))[0])
        assert not sparse._in_batch


def test_two_processes_train_as_one(tmp_path):
    run_fresh_ranks(loop_ranks.run_all, 2, tmp_path)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for method in loop_ranks.METHODS:
        assert same(ours[method], theirs[method])
        alone = loop_ranks.train(method)
        assert ours[method].keys() == alone.keys()
        assert all(torch.allclose(ours[method][name].double(), x.double(), atol=1e-10) for name, x in alone.items())


def test_what_cannot_be_is_refused():
    module = seeded(Lit)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        attached(RigL(0.8), module, steps=0)
    with pytest.raises(ValueError, match="loss and batches must be given for OneShot"):
        attached(OneShot(0.8, criterion="wanda"), seeded(Lit), loss=None)
    with pytest.raises(ValueError, match="loss and batches must be given for SNIP"):
        attach(SNIP(0.8), module, sgd(module.parameters()), steps=10)
    with pytest.raises(TypeError, match=r"method must be one such as RigL\(sparsity=0.9\), got str"):
        attached("RigL", module)
    with pytest.raises(TypeError, match="optimizer must be an optimizer, several, or a function that makes one"):
        attached(RigL(0.8), module, [1])
    with (
        pytest.raises(RuntimeError, match="must be called before the context is entered"),
        attached(RigL(0.8), module) as sparse,
    ):
        sparse.load_state_dict(sparse.state_dict())
    with pytest.raises(RuntimeError, match="cannot go on in a loop of your own"):
        attached(RigL(0.8, storage="sparse"), module, sgd).load_state_dict({})
    with (
        pytest.raises(MisconfigurationException, match="found nothing to make sparse"),
        attached(SWAT(0.8), nn.BatchNorm1d(3)),
    ):
        pass
