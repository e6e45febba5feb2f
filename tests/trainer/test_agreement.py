"""A run goes on only with arguments and a state that agree with the checkpoint's, and with those of other processes."""

import warnings

import agreement_ranks
import pytest
import torch
from helpers import PLAINLY, ROUNDS, SETTINGS, Lit, SavesFirst, fit, loader, seeded, trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import run_fresh_ranks
from stored import measured

import lightning_sparse.storage.layer_backends as layer_backends
from lightning_sparse.trainer.agreement import refuse_broken_positions

METHODS = {**SETTINGS, **ROUNDS, "RigL sparse": lambda **kw: SETTINGS["RigL"](storage="sparse", **kw)}


@pytest.fixture(autouse=True)
def quick_and_the_same_everywhere(monkeypatch):
    """No measurement decides who multiplies."""
    monkeypatch.setattr(layer_backends, "measure_all", measured({"torch": 0.5, "dense": 1.0}))


def checkpoint(path, method, change=lambda state: None, **arguments):
    """Write one in the middle of a training, and change the method's state in it."""
    epochs = 3 if method in ROUNDS else 2
    fit([METHODS[method](**arguments), SavesFirst(path)], None, loader(80), max_epochs=epochs)
    contents = torch.load(path, weights_only=True)
    (state,) = contents["callbacks"].values()
    change(state)
    torch.save(contents, path)
    return path


def resume(path, method, epochs=3, **arguments):
    callback = METHODS[method](**arguments)
    trainer(callback, max_epochs=epochs).fit(seeded(Lit), loader(80), ckpt_path=path, **PLAINLY)
    return callback


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("method", "there", "here"),
    [
        ("DST", {"alpha": 5e-3}, {"alpha": 1e-3}),
        ("DFBST", {"beta": 0.5}, {"beta": 0.1}),
        ("AutoSparse", {"alpha": 0.6}, {"alpha": 0.5}),
        ("TopKAST", {"backward_sparsity": 0.5}, {"backward_sparsity": 0.4}),
        ("OptG", {"end_at": 0.6}, {"end_at": 0.5}),
        ("RigL", {"update_every": 7}, {"update_every": 3}),
        ("SET", {"seed": 1}, {"seed": 2}),
        ("GMP", {"scope": "global"}, {"scope": "layer"}),
    ],
)
def test_other_arguments_than_the_checkpoints_are_told_with_both_values(method, there, here, tmp_path):
    path = checkpoint(tmp_path / "x.ckpt", method, **there)
    ((name, new),), (old,) = here.items(), there.values()
    with pytest.warns(UserWarning, match=rf"goes on with other arguments .*{name}={new!r}, not {old!r}\. "):
        resume(path, method, **here)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(path, method, **there, log_every_n_steps=5)
    assert not [w for w in caught if "other arguments" in str(w.message)]


@pytest.mark.parametrize(
    ("method", "there", "here", "told"),
    [
        ("TopKAST", {"power": 1.0}, {"power": 2.0}, r"written with power=1\.0, this TopKAST\(.* has 2\.0"),
        ("LotteryTicket", {"rounds": 2}, {"rounds": 1}, r"a fit of 2 rounds, this LotteryTicket\(.* has rounds=1"),
    ],
)
def test_arguments_without_which_the_state_means_something_else_are_refused(method, there, here, told, tmp_path):
    path = checkpoint(tmp_path / "x.ckpt", method, **there)
    with pytest.raises(MisconfigurationException, match=told):
        resume(path, method, **here)


def test_rounds_that_are_left_out_are_those_of_the_checkpoint(tmp_path):
    callback = resume(checkpoint(tmp_path / "x.ckpt", "LotteryTicket"), "LotteryTicket", rounds=None)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("method", ["DST", "TopKAST", "RigL", "LotteryTicket", "RigL sparse"])
def test_checkpoints_of_versions_that_wrote_no_arguments_are_resumed(method, tmp_path):
    def older(state):
        del state["arguments"]
        state.pop("active", None)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(checkpoint(tmp_path / "x.ckpt", method, older), method)
    assert not [w for w in caught if "other arguments" in str(w.message)]


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("DST", ("weights", "granularity")),
        ("TopKAST", ("weights", "sparsity", "updates")),
        ("RigL", ("weights", "clocks", "generator", "epoch")),
        ("RigL sparse", ("clocks",)),
        ("LotteryTicket", ("weights", "rewind_point")),
        ("MEST", ("above",)),
    ],
)
def test_what_is_missing_in_the_state_is_named(method, keys, tmp_path):
    path = checkpoint(tmp_path / "x.ckpt", method)
    for key in keys:
        contents = torch.load(path, weights_only=True)
        (state,) = contents["callbacks"].values()
        del state[key]
        torch.save(contents, tmp_path / "broken.ckpt")
        name = method.split()[0]
        with pytest.raises(MisconfigurationException, match=rf"has no '{key}' in the state of {name}\("):
            resume(tmp_path / "broken.ckpt", method)


@pytest.mark.parametrize(("method", "key"), [("DST", "latent"), ("STR", "thresholds"), ("GMP", "mask")])
def test_what_is_missing_in_the_state_of_a_weight_is_named(method, key, tmp_path):
    path = checkpoint(tmp_path / "x.ckpt", method, lambda state: state["weights"]["net.2.weight"].pop(key))
    told = "another storage" if key == "mask" else rf"has no '{key}' in what {method}\(.* keeps of net\.2\.weight"
    with pytest.raises(MisconfigurationException, match=told):
        resume(path, method)


@pytest.mark.parametrize("method", ["RigL", "GMP", "LotteryTicket"])
def test_masks_that_were_changed_are_refused_by_name(method, tmp_path):
    def change(state):
        mask = state["weights"]["net.2.weight"]["mask"]
        mask.view(-1)[mask.view(-1).nonzero()[:3]] = False

    path = checkpoint(tmp_path / "x.ckpt", method, change)
    with pytest.raises(MisconfigurationException, match=r"mask of net\.2\.weight has \d+ connections, but .* had \d+"):
        resume(path, method)


@pytest.mark.parametrize(
    ("method", "name", "change"),
    [
        ("RigL", "step", lambda state: state["clocks"]["0"].update(step=-5)),
        ("RigL", "step", lambda state: state["clocks"]["0"].pop("step")),
        ("TopKAST", "net.0.weight", lambda state: state["updates"].update({"net.0.weight": -1})),
        ("LotteryTicket", "pruned", lambda state: state.update(pruned=-1)),
    ],
)
def test_clocks_that_are_no_counts_are_refused_by_name(method, name, change, tmp_path):
    path = checkpoint(tmp_path / "x.ckpt", method, change)
    with pytest.raises(MisconfigurationException, match=rf"clock whose '{name}' is a whole number of at least 0, got"):
        resume(path, method)


@pytest.mark.parametrize("broken", [[1, 1, 2], [2, 1, 3], [-1, 0, 1], [3, 5, 192]])
def test_positions_that_are_no_positions_are_refused_by_name(broken, tmp_path):
    def change(state):
        positions = state["weights"]["net.0.weight"]["positions"]
        positions[:3] = torch.tensor(broken)
        state["weights"]["net.0.weight"]["positions"] = positions[:3]

    path = checkpoint(tmp_path / "x.ckpt", "RigL sparse", change)
    with pytest.raises(MisconfigurationException, match=r"positions of net\.0\.weight must be ascending.*0 to 191"):
        resume(path, "RigL sparse")


def test_positions_as_they_are_written_are_taken():
    refuse_broken_positions("w", torch.tensor([0, 3, 4]), 5)
    refuse_broken_positions("w", torch.tensor([], dtype=torch.int32), 5)


# ---------------------------------------------------------------------- other processes


def test_callbacks_that_differ_between_processes_are_refused_on_all_of_them(tmp_path):
    run_fresh_ranks(agreement_ranks.run_all, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    told = {
        "seed": "seed must be the same on all processes, but SET has seed=0 on rank 0 and 1 on rank 1",
        "sparse": "seed must be the same on all processes, but SET has seed=0 on rank 0 and 1 on rank 1",
        "alpha": "alpha must be the same on all processes, but DST has alpha=0.001 on rank 0 and 0.002 on rank 1",
        "exclude": "exclude must be the same on all processes, but RigL has exclude=[] on rank 0 and ['net.0.*']",
        "method": "rank 0 has RigL where rank 1 has SET",
    }
    for name, message in told.items():
        assert first[name] == second[name]
        assert message in first[name]
    for name, mask in first["none"].items():
        assert torch.equal(mask, second["none"][name]), "without a seed, that of the first process"
    assert (first["uneven"], second["uneven"]) == ((10, 10), (10, 8)), "one schedule, whatever each has to train on"
