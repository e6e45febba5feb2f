"""A compiled module trains to the same result as an eager one."""

import contextlib
import functools
import warnings

import lightning.pytorch as pl
import pytest
import torch
from helpers import LATENT, ROUNDS, SETTINGS, THRESHOLDS, Lit, effective, fit, loader, seeded, trainer
from stored import measured
from torch import nn

import lightning_sparse.storage.layer_backends as layer_backends
from lightning_sparse import SET, MemoryEfficientDST, RigL
from lightning_sparse.compat.compiled import Uncompiled, can_pause, copied, is_compiled
from lightning_sparse.layers.unit_activity import SynapticFlow

SPARSE = {"storage": "sparse", "include": ["*0.weight"], "distribution": "uniform", "stop_at": 0.5}
# Methods that listen to the layers in the steps that move connections.
LISTENING = {
    "MemoryEfficientDST": SETTINGS["MemoryEfficientDST"],
    "MemoryEfficientDST, synflow": lambda: MemoryEfficientDST(0.8, heuristic="synflow", update_every=7),
    "MemoryEfficientDST, sparse": lambda: MemoryEfficientDST(0.8, update_every=7, **SPARSE),
    "SET, sparse": lambda: SET(0.8, update_every=7, **SPARSE),
    "RigL, sparse": lambda: RigL(0.8, update_every=7, **SPARSE),
}
ROWS = {**SETTINGS, **ROUNDS, **LISTENING}
# What the compiler sees of these is what it sees of RigL, or of DST.
AS_OTHERS = ("SET", "ITOP", "MEST", "SNFS", "DSR", "GGR", "GraNet", "RandomPruning", "FixedMask", "AutoSparse", "STR")
CASES = [("module", method) for method in ROWS if method not in (*AS_OTHERS, "SET, sparse")]
CASES += [("net", method) for method in ("DST", "OptG", "RigL", "SNIP", *LISTENING) if "sparse" not in method]


def small():
    return nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)),
        nn.Conv2d(3, 8, 2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 4),
    )


def two_layers():
    """Two with inputs alike, so that SWAT's choice among them is compiled once."""
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))


pauses = pytest.mark.skipif(not can_pause(), reason="compiled code can be paused since torch 2.6")
compile_ = functools.partial(torch.compile, backend="aot_eager")


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch):
    """Compile anew, with no stance left behind; and no measurement decides who multiplies."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(layer_backends, "measure_all", measured({"torch": 0.5, "dense": 1.0}))
    yield
    assert stance() == "default"
    assert not Uncompiled._open


def stance():
    return torch._dynamo.eval_frame._stance.stance if can_pause() else "default"


def net_of(method):
    """A convolution for those that differ in what is compiled; not where compiling takes long."""
    convolves = method in (*THRESHOLDS, "TopKAST", "OptG", *LISTENING) and "sparse" not in method
    return small if convolves else two_layers


def compiled_lit(what, net=two_layers):
    """What is given to the Trainer, and the module in it."""
    module = seeded(lambda: Lit(net()))
    if what == "net":
        module.net = compile_(module.net)
    elif what == "in place":
        module.net.compile(backend="aot_eager")
    return (compile_(module) if what == "module" else module), module


def train(method, given):
    callback = ROWS[method]()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*uniformly.*")  # nothing was heard
        fit(callback, given, loader(160), max_epochs=3 if method in ROUNDS else 2, accumulate_grad_batches=2)
    return callback


@functools.cache
def eager_run(method):
    module = seeded(lambda: Lit(net_of(method)()))
    return train(method, module), module


@pytest.mark.parametrize(("what", "method"), CASES)
def test_compiled_module_trains_as_the_eager_one(what, method):
    if method in LISTENING and not can_pause():
        pytest.skip("compiled layers do not tell what enters them before torch 2.6: a warning says so")
    eager, plain = eager_run(method)
    given, module = compiled_lit(what, net_of(method))
    compiled = train(method, given)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert eager.sparsity > 0.02
    names = {name.replace("_orig_mod.", ""): name for name in compiled.masks}
    assert names.keys() == eager.masks.keys()
    for name, compiled_name in names.items():
        if method in LATENT:
            assert torch.allclose(eager.latents[name], compiled.latents[compiled_name], atol=1e-5)
        if method in THRESHOLDS:
            assert torch.allclose(eager.thresholds[name], compiled.thresholds[compiled_name], atol=1e-5)
        assert torch.equal(eager.masks[name], compiled.masks[compiled_name])
    assert effective(module, compiled)
    assert torch.allclose(plain.eval()(torch.ones(2, 12)), module.eval()(torch.ones(2, 12)), atol=1e-5)


class Stances(pl.Callback):
    """Notes the compiler's stance in every training step and every validation batch."""

    def __init__(self):
        self.training, self.validation = [], []

    def on_before_backward(self, *args):
        self.training.append(stance())

    def on_validation_batch_start(self, *args):
        self.validation.append(stance())


@pauses
def test_only_the_steps_that_move_connections_run_uncompiled():
    stances, method = Stances(), MemoryEfficientDST(0.8, update_every=4, stop_at=0.8)
    given, _ = compiled_lit("net")
    run = trainer([method, stances], max_epochs=1, val_check_interval=4, num_sanity_val_steps=0)
    run.fit(given, loader(96), loader(8))
    assert [step for step, now in enumerate(stances.training) if now == "force_eager"] == [4, 8]
    assert stances.validation == ["default"] * 3


@pauses
def test_two_methods_with_layers_of_their_own_move_connections_uncompiled():
    a = MemoryEfficientDST(0.8, update_every=4, include=["*.0.weight"])
    b = MemoryEfficientDST(0.8, update_every=6, include=["*.2.weight"], stop_at=0.9)
    stances = Stances()
    given, _ = compiled_lit("net")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*uniformly.*")
        fit([a, b, stances], given, loader(160), max_epochs=1)
    assert [step for step, now in enumerate(stances.training) if now == "force_eager"] == [4, 6, 8, 12]


class Breaks(Lit):
    def training_step(self, batch, batch_idx):
        if batch_idx == 4:
            raise KeyError("a bad batch")
        return super().training_step(batch, batch_idx)


def test_the_stance_comes_back_after_an_exception():
    module = seeded(Breaks)
    module.net = compile_(module.net)
    with pytest.raises(KeyError, match="a bad batch"):
        fit(MemoryEfficientDST(0.8, update_every=4), module)
    assert stance() == "default"


def test_the_stance_comes_back_at_teardown():
    method = MemoryEfficientDST(0.8, update_every=4)
    given, _ = compiled_lit("net")
    # the fit ends between micro-batches of a step that was to move connections
    fit(method, given, loader(96), max_epochs=1, max_steps=5, accumulate_grad_batches=2)
    method.setup(trainer(method), given, "fit")
    assert stance() == "default"


@pauses
def test_the_stance_of_the_run_comes_back_whatever_the_order():
    with torch.compiler.set_stance("eager_on_recompile"):
        first, second = Uncompiled(), Uncompiled()
        first.close()
        first.close()
        assert stance() == "force_eager"
        with contextlib.closing(Uncompiled()):
            second.close()
            assert stance() == "force_eager"
        assert stance() == "eager_on_recompile"


@pytest.mark.parametrize(("what", "warns"), [("module", True), ("net", True), ("in place", True), ("nothing", False)])
def test_a_pytorch_that_cannot_pause_is_warned_of(what, warns, monkeypatch):
    monkeypatch.delattr(torch.compiler, "set_stance", raising=False)
    given, _ = compiled_lit(what)
    method = MemoryEfficientDST(0.8, update_every=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(method, given, loader(80), max_epochs=1)
    assert sum("Update to PyTorch 2.6" in str(warning.message) for warning in told) == int(warns)


@pytest.mark.parametrize("what", ["module", "net", "in place"])
def test_synaptic_flow_is_that_of_the_eager_network(what):
    flows = []
    for how in ("nothing", what):
        given, module = compiled_lit(how)
        given(torch.ones(2, 12))  # compiled before there is a listener
        names = [name for name, _ in module.named_parameters() if name.endswith("weight")]
        listener = SynapticFlow(module, names)
        with contextlib.closing(Uncompiled()):
            given(torch.ones(2, 12)) if how == "module" else module(torch.ones(2, 12))
        flows.append([flow for pair in listener.sums().values() for flow in pair])
    assert all(torch.equal(a, b) for a, b in zip(*flows, strict=True))
    assert flows[0][0].any()


def test_a_copy_of_a_compiled_lightning_module_has_its_own_methods():
    from lightning.pytorch.utilities.compile import from_compiled

    module = from_compiled(compile_(seeded(Lit)))
    own = copied(module, module)
    assert is_compiled(module)
    assert not is_compiled(own)
    own.net[4].bias.data.fill_(100.0)
    assert own(torch.ones(1, 12)).min() > 50 > module(torch.ones(1, 12)).max()
