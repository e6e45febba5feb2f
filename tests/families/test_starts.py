"""What a fit begins with: random connections, the largest weights, the zeros that are there, a file's masks."""

import sys
import warnings

import pytest
import torch
from helpers import MASKED, Lit, attached, cnn, fit, loader, mlp, prune, saved, seeded, trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_sparse import DST, GMP, SET, SNIP, DeepR, FixedMask, GraNet, LotteryTicket, MemoryEfficientDST, RigL
from lightning_sparse.rules.budgets import budget, layer_counts
from lightning_sparse.storage import SparseLinear

KEEPING = [name for name in MASKED if "initial" in dict(MASKED[name]().arguments)]
SPARSE = ["SET", "RigL", "RandomPruning", "MemoryEfficientDST", "FixedMask"]


def pruned(net=mlp, dtype=torch.float32):
    """A module with zeros of many kinds, and its weights."""
    module = Lit(prune(seeded(lambda: net(dtype))).train(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    return module, {f"net.{name}": W.detach().clone() for name, W in module.net.named_parameters() if W.ndim > 1}


def begun(callback, module, batches=1, **options):
    """Fit for a step that changes nothing, before any connection moves."""
    fit(callback, module, loader(8 * batches), max_steps=batches, max_epochs=-1, **options)
    return callback.masks


def test_the_methods_that_begin_sparse_take_a_start():
    without = {"OneShot", "SNIP", "GraSP", "SynFlow"}
    assert set(KEEPING) == set(MASKED) - without
    for build in (SNIP, LotteryTicket):
        with pytest.raises(TypeError, match="unexpected keyword argument 'initial'"):
            build(0.9, initial="zeros")


# ---------------------------------------------------------------------- which connections


@pytest.mark.parametrize("net", [mlp, cnn])
@pytest.mark.parametrize("method", [name for name in KEEPING if name != "SRigL"])  # which refuses uneven rows
@pytest.mark.filterwarnings("ignore:.*(will move|will prune|the training ended)")
def test_zeros_that_are_there_stay_and_their_number_is_the_budget(method, net):
    module, weights = pruned(net)
    more = {"initial": "zeros"} if method in ("GMP", "GraNet") else {"initial": "zeros", "sparsity": None}
    masks = begun(MASKED[method](**more), module)
    if method == "GMP":  # whose last pruning has come
        assert all(not (mask & (weights[name] == 0)).any() for name, mask in masks.items())
    elif method != "GraNet":
        assert all(torch.equal(mask, weights[name] != 0) for name, mask in masks.items())
    assert all(torch.equal(module.get_parameter(name), weights[name] * mask) for name, mask in masks.items())


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("initial", ["zeros", "magnitude", "global_magnitude", "file"])
@pytest.mark.filterwarnings("ignore:.*will move")
def test_masked_and_sparse_storage_begin_alike(method, initial, tmp_path):
    sparsity = 0.8 if "magnitude" in initial else None
    if initial == "file":
        initial = str(tmp_path / "masks.safetensors")
        save_file({name: torch.rand(W.shape) < 0.3 for name, W in pruned()[1].items()}, initial)
    states = []
    for storage in ("masked", "sparse"):
        module, weights = pruned()
        callback = MASKED[method](sparsity=sparsity, initial=initial, storage=storage)
        masks = begun(callback, module)
        assert all(torch.equal(module.get_parameter(name), weights[name] * mask) for name, mask in masks.items())
        states.append(masks)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(mask, states[1][name]) for name, mask in states[0].items())


@pytest.mark.parametrize("distribution", ["uniform", "erk", {"net.0.weight": 0.25}])
def test_the_largest_weights_of_each_layer_stay_as_many_as_the_distribution_gives(distribution):
    module = seeded(Lit)
    weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.ndim > 1}
    callback = FixedMask(0.8, initial="magnitude", distribution=distribution)
    module.make_optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    masks = begun(callback, module)
    counts = layer_counts(distribution, {name: tuple(W.shape) for name, W in weights.items()}, budget(0.8, 392))
    for name, W in weights.items():
        order = W.abs().flatten().argsort(descending=True)
        assert masks[name].flatten().nonzero()[:, 0].tolist() == order[: counts[name]].sort().values.tolist()


@pytest.mark.parametrize("floor", [0.0, 0.15])
def test_the_largest_weights_of_all_layers_stay_but_for_the_floor_of_each(floor):
    module = seeded(Lit)
    module.net[4].weight.data.mul_(0.01)
    weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.ndim > 1}
    module.make_optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    masks = begun(FixedMask(0.8, initial="global_magnitude", min_layer_density=floor), module)
    assert sum(int(mask.sum()) for mask in masks.values()) == budget(0.8, 392)
    assert [int(mask.sum()) >= floor * mask.numel() for mask in masks.values()] == [True] * 3
    if floor:
        return
    assert not masks["net.4.weight"].any()
    kept = torch.cat([weights[n][masks[n]].abs() for n in ("net.0.weight", "net.2.weight")]).min()
    left = torch.cat([weights[n][~masks[n]].abs() for n in ("net.0.weight", "net.2.weight")]).max()
    assert kept > left


@pytest.mark.parametrize("method", [GMP, GraNet])
def test_a_gradual_schedule_begins_with_the_largest_weights_or_the_zeros_and_ends_exactly(method):
    for options, first in (
        ({"initial": "global_magnitude", "initial_sparsity": 0.5}, budget(0.5, 392)),
        ({"initial": "magnitude", "initial_sparsity": 0.5}, budget(0.5, 392)),
        ({"initial": "zeros"}, None),
    ):
        module, weights = pruned()
        first = sum(int(W.count_nonzero()) for W in weights.values()) if first is None else first
        callback = method(0.9, update_every=2, **options)
        fit(callback, module, loader(96), max_epochs=1)
        assert sum(callback.layer_count.values()) == budget(0.9, 392)
        assert callback._groups.clocks[0]["values"]["start"] == first


def test_signs_of_deepr_are_those_of_the_weights_that_stay():
    W = [[0.0, 0.5, -0.5], [0.3, 0.0, -0.2]]
    _, _, (weight,) = attached(DeepR(None, initial="zeros"), {"W": W}, {"W": W})
    nonzero = torch.tensor(W) != 0
    assert torch.equal(weight.mask, nonzero)
    assert torch.equal(weight.buffers["positive"][nonzero], torch.tensor(W)[nonzero] > 0)


# ---------------------------------------------------------------------- files of masks


def test_masks_of_one_run_begin_another_of_any_method(tmp_path):
    path = tmp_path / "masks.safetensors"
    for first in (DST(5e-3), SET(0.7, storage="sparse")):
        fit(first, train=loader(64))
        first.save_masks(path)
        held = load_file(path)
        assert held.keys() == first.masks.keys()
        module = seeded(lambda: Lit(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)))
        masks = begun(FixedMask(initial=path), module)
        assert all(torch.equal(mask, held[name]) for name, mask in masks.items())
        assert all(torch.equal(mask, first.masks[name]) for name, mask in masks.items())


def test_masks_cannot_be_saved_before_there_are_any_nor_under_another_name(tmp_path):
    with pytest.raises(RuntimeError, match=r"SET.* has no weights yet"):
        SET(0.8).save_masks(tmp_path / "masks.safetensors")
    with pytest.raises(ValueError, match=r"path must end with \.safetensors, got .*masks\.pt"):
        SET(0.8).save_masks(tmp_path / "masks.pt")


def test_files_need_an_extra_which_the_error_names(monkeypatch, tmp_path):
    callback = SET(0.8)
    fit(callback, train=loader(8), max_epochs=1)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"safetensors is not installed: pip install 'lightning-sparse\[masks\]'"
    ):
        callback.save_masks(tmp_path / "masks.safetensors")


def test_files_are_refused_by_name_key_and_rule(tmp_path):
    path = str(tmp_path / "masks.safetensors")
    good = {name: W != 0 for name, W in pruned()[1].items()}

    def begin(masks, **options):
        save_file(masks, path)
        begun(RigL(**{"sparsity": None, "initial": path, **options}), pruned()[0])

    with pytest.raises(MisconfigurationException, match=r"RigL.*needs a mask of 'net\.2\.weight', but .*masks\.safet"):
        begin({name: mask for name, mask in good.items() if name != "net.2.weight"})
    with pytest.raises(MisconfigurationException, match=r"'net\.2\.weight' of shape \(10, 16\), but .* \(16, 10\)"):
        begin({**good, "net.2.weight": torch.ones(16, 10, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"boolean masks, got .*masks\.safetens.* 'net\.0\.weight' is of torch"):
        begin({**good, "net.0.weight": torch.ones(16, 12)})
    with pytest.raises(MisconfigurationException, match=r"RigL.*initial='.*masks.* conn.*sparsity=0\.8 asks for"):
        begin(good, sparsity=0.8)
    with pytest.warns(UserWarning, match=r"leaves masks of the file unused: \['other'\] are not among"):
        begin({**good, "other": torch.ones(2, 2, dtype=torch.bool)}, update_every=1)
    (tmp_path / "masks.safetensors").write_bytes(b"not this")
    with pytest.raises(ValueError, match=r"initial must be a file of masks, got .* not in the format safetensors"):
        begun(RigL(None, initial=path), pruned()[0])
    with pytest.raises(FileNotFoundError, match=r"initial must be a file that exists, got 'none\.safetensors'"):
        begun(RigL(None, initial="none.safetensors"), pruned()[0])


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: RigL(0.9, initial="magnitud"), ValueError, r"initial must be one of .*safetensors, got 'magnitud'"),
        (lambda: RigL(0.9, initial=3), ValueError, "initial must be one of"),
        (lambda: RigL(None), ValueError, r"sparsity must be a number from 0 to 1 with initial='random', got None"),
        (lambda: SET(None, initial="magnitude"), ValueError, "sparsity must be a number"),
        (lambda: GMP(0.9, initial="magnitude"), ValueError, r"initial_sparsity must be above 0 with initial='magn"),
        (lambda: RigL(), TypeError, "RigL is missing the argument 'sparsity'"),
    ],
)
def test_bad_arguments_are_refused_at_construction(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("storage", ["masked", "sparse"])
def test_zeros_that_are_not_there_or_not_so_many_are_refused(storage):
    with pytest.raises(MisconfigurationException, match=r"FixedMask.* keeps the zeros .* net\.4\.weight have none"):
        fit(FixedMask(storage=storage))
    count = sum(int(W.count_nonzero()) for W in pruned()[1].values())
    with pytest.raises(MisconfigurationException, match=rf"have {count} conn.*0\.5 asks for 196.*Give sparsity=None"):
        fit(RigL(0.5, initial="zeros", storage=storage), pruned()[0])


@pytest.mark.parametrize("build", [lambda **kw: RigL(None, **kw), lambda **kw: GMP(0.9, **kw)])
def test_a_start_that_leaves_a_layer_below_the_least_density_is_refused(build):
    module = pruned()[0]
    module.net[4].weight.data.zero_()
    with pytest.raises(MisconfigurationException, match=r"min_layer_density=0\.05, but net\.4\.weight begin with less"):
        fit(build(initial="zeros", min_layer_density=0.05), module)


def test_a_schedule_that_ends_denser_than_it_begins_is_refused():
    with pytest.raises(MisconfigurationException, match=r"GMP.* prunes to 353 connections, but begins with \d+"):
        fit(GMP(0.1, initial="zeros"), pruned()[0])


@pytest.mark.parametrize("initial", ["zeros", "magnitude", "global_magnitude"])
def test_values_that_a_layer_on_the_meta_device_does_not_have_yet_cannot_be_kept(initial):
    class OnMeta(Lit):
        def configure_model(self):
            self.net = mlp().to("meta")

    with pytest.raises(NotImplementedError) as error:  # of the Trainer, which wants to bring such a module to the CPU
        fit(SET(0.8, initial=initial, storage="sparse"), OnMeta(nn.Identity()))
    cause = error.value.__context__
    assert isinstance(cause, MisconfigurationException)
    assert "net.0.weight is on the meta device and has no values yet" in str(cause)


@pytest.mark.parametrize("initial", ["magnitude", "global_magnitude"])
def test_weights_that_are_not_finite_are_not_ranked(initial):
    module = seeded(Lit)
    module.net[2].weight.data[1, 1] = torch.nan
    with pytest.raises(MisconfigurationException, match=r"SET.*net\.2\.weight has values that are NaN or infinite"):
        fit(SET(0.8, initial=initial), module)


def test_layers_that_are_sparse_already_keep_their_connections():
    def made(nnz):
        return Lit(nn.Sequential(SparseLinear(12, 16, nnz), nn.ReLU(), SparseLinear(16, 4, 20)))

    with pytest.raises(MisconfigurationException, match=r"SET.*chooses conn.*, but net\.0\.weight, net\.2\.weight"):
        fit(SET(0.8, initial="magnitude", storage="sparse"), made(40))
    callback = FixedMask(storage="sparse")
    fit(callback, made(40))
    assert list(callback.layer_count.values()) == [40, 20]


# ---------------------------------------------------------------------- trained weights that would be lost


def told(callback, module, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        begun(callback, module, **options)
    return [str(warning.message) for warning in caught if "look trained" in str(warning.message)]


@pytest.mark.parametrize("storage", ["masked", "sparse"])
def test_random_connections_in_a_trained_network_are_told_of_with_the_remedy(storage):
    (message,) = told(RigL(0.9, storage=storage), pruned()[0])
    assert message.startswith("RigL(sparsity=0.9")
    assert "initial='magnitude'" in message
    assert "initial='zeros'" in message
    assert "net.0.weight" in message
    assert not told(RigL(0.9, storage=storage), seeded(Lit)), "a fresh network"
    assert not told(RigL(0.9, initial="magnitude", storage=storage), pruned()[0])


def test_methods_that_throw_nothing_away_tell_nothing():
    for callback in (GMP(0.95, update_every=1), SNIP(0.9), LotteryTicket(0.9, rounds=1), FixedMask()):
        fresh = {"max_steps": -1, "max_epochs": 2} if isinstance(callback, LotteryTicket) else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*look trained")
            fit(callback, pruned()[0], loader(8), **{"max_epochs": 1, **fresh})
    assert told(GraNet(0.95), pruned()[0])


def test_a_resumed_run_and_a_second_fit_are_not_told_of(tmp_path):
    for storage in ("masked", "sparse"):
        callback, module = SET(0.8, storage=storage), seeded(Lit)
        _, run = fit(callback, module, loader(64), max_epochs=1)
        run.save_checkpoint(tmp_path / "one.ckpt")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*look trained")
            fit(callback, module, loader(64), max_epochs=1)
            again = trainer(SET(0.8, storage=storage), max_epochs=2)
            again.fit(module, loader(64), ckpt_path=tmp_path / "one.ckpt")


def test_the_weights_of_a_network_that_is_there_are_not_scaled():
    module, weights = pruned()
    masks = begun(MemoryEfficientDST(None, initial="zeros"), module)
    assert all(torch.equal(module.get_parameter(name), weights[name] * mask) for name, mask in masks.items())


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("storage", ["masked", "sparse"])
def test_a_run_without_a_number_resumes_in_a_module_without_zeros_and_refuses_one_with_a_number(storage, tmp_path):
    def build(**options):
        return SET(
            **{"sparsity": None, "initial": "zeros", "update_every": 5, "decay": "none", "storage": storage, **options}
        )

    def module():
        return Lit(prune(seeded(mlp)).train())

    whole, stopped, resumed = build(), build(), build()
    one, _ = fit(whole, module(), loader(96), deterministic=True)  # so that the same backend multiplies
    _, run = fit(stopped, module(), loader(96), max_epochs=1, deterministic=True)
    assert None not in saved(run, tmp_path / "one.ckpt")["callbacks"][stopped.state_key].values()
    two = seeded(Lit, 9)
    trainer(resumed, deterministic=True).fit(two, loader(96), ckpt_path=tmp_path / "one.ckpt")
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in whole.masks.items())
    assert all(torch.equal(p, two.get_parameter(name)) for name, p in one.named_parameters())
    other = build(sparsity=0.8, initial="random")
    with pytest.raises(MisconfigurationException, match=r"written with sparsity=None, this SET.* has 0\.8"):
        trainer(other).fit(seeded(Lit), loader(96), ckpt_path=tmp_path / "one.ckpt")
