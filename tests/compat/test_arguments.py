"""Constructors refuse what they do not know in the name of the method, and are as they would be without that."""

import copy
import inspect
import pickle
from functools import partial

import pytest
from helpers import ROUNDS, SETTINGS

import lightning_sparse
from lightning_sparse import DST, SNIP, SWAT, MemoryEfficientDST, OptG, RigL, TopKAST

METHODS = {**SETTINGS, **ROUNDS}


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_argument_is_refused_by_the_method_that_was_called_with_what_it_takes(method):
    with pytest.raises(
        TypeError, match=rf"^{method} got an unexpected keyword argument 'exlude'\. Did you mean "
    ) as error:
        METHODS[method](exlude=["net.0.weight"])
    (own, *_) = inspect.signature(getattr(lightning_sparse, method)).parameters
    taken = str(error.value).split("It takes: ")[1].rstrip(".").split(", ")
    assert {own, "include", "exclude", "log_every_n_steps"} <= set(taken)
    assert "options" not in taken


def test_the_nearest_argument_is_named_and_those_that_a_method_sets_itself_are_not():
    with pytest.raises(
        TypeError, match=r"^RigL got .* 'sparsty'\. Did you mean 'sparsity'\? It takes: sparsity, drop_"
    ):
        RigL(sparsty=0.9)
    with pytest.raises(TypeError, match=r"^RigL got .* 'drop_share'\. It takes"):
        RigL(0.9, drop_share=0.5)
    with pytest.raises(TypeError, match=r"^DST got .* 'sparsity'\. It takes: alpha, granularity, reset_above, include"):
        DST(sparsity=0.9)
    with pytest.raises(TypeError, match=r"^MemoryEfficientDST got an unexpected .* 'decay'\. It takes: (?!.*decay)"):
        MemoryEfficientDST(0.9, decay="linear")
    for build in (OptG, SWAT, partial(TopKAST, backward_sparsity=0.5)):
        with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'granularity'"):
            build(0.9, granularity="layer")


class Own(RigL):
    """A user's method with an option of its own."""

    def __init__(self, *args, **options):
        self.own = options.pop("own", 0)
        super().__init__(*args, **options)


def test_other_mistakes_of_a_call_are_told_as_they_are():
    with pytest.raises(TypeError, match=r"RigL.__init__\(\) got multiple values for argument 'sparsity'"):
        RigL(0.9, sparsity=0.9)
    with pytest.raises(TypeError, match=r"SNIP.__init__\(\) missing 1 required positional argument: 'sparsity'"):
        SNIP()
    assert Own(0.9, own=3).own == 3
    with pytest.raises(TypeError, match=r"^Own got an unexpected keyword argument 'owm'"):
        Own(0.9, owm=3)


@pytest.mark.parametrize("method", METHODS)
def test_constructors_keep_their_signature_and_methods_can_be_copied(method):
    kind = getattr(lightning_sparse, method)
    source = inspect.getsource(kind.__init__)
    assert source.lstrip().startswith("def __init__(")
    assert all(name in source for name in inspect.signature(kind).parameters)
    callback = METHODS[method]()
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin.arguments == callback.arguments
    assert callback.masks == callback.layer_density == {}


def test_every_method_hands_the_arguments_of_its_bases_on():
    """Of which each base checks its own."""
    taken = {"include": ["net.*"], "exclude": ["net.2.*"], "log_every_n_steps": 3}
    for method, build in METHODS.items():
        callback = build(**taken)
        assert {name: getattr(callback, name) for name in taken} == taken, method
        for wrong in ({"include": "net.*"}, {"exclude": [1]}, {"log_every_n_steps": 0}):
            with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be "):
                build(**wrong)
