"""Options: every method says all that it takes, and constructors refuse the rest in the name of the method."""

import copy
import inspect
import pickle
from typing import Literal

import pytest
from helpers import ROUNDS, SETTINGS

import lightning_sparse
from lightning_sparse import DST, SNFS, SNIP, STR, SWAT, AutoSparse, OptG, RigL, TopKAST
from lightning_sparse.compat.options import Options, fixed, option

METHODS = {**SETTINGS, **ROUNDS}
GENERAL = ["include", "exclude", "log_every_n_steps", "log_layers"]


@pytest.mark.parametrize("method", METHODS)
def test_a_signature_lists_every_argument_with_type_and_default_and_the_docstring_its_text(method):
    kind = getattr(lightning_sparse, method)
    signature = inspect.signature(kind)
    assert list(signature.parameters) == list(inspect.signature(kind.__init__).parameters)[1:]
    assert list(signature.parameters)[-4:] == GENERAL
    args = inspect.getdoc(kind).split("Args:\n")[1]
    for name, parameter in signature.parameters.items():
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY), "no **options"
        assert parameter.annotation is not parameter.empty
        assert f"\n    {name}: " in f"\n{args}", f"{name} has no text"


def test_methods_with_masks_show_what_their_base_takes():
    shared = {"distribution", "min_layer_density", "seed", "storage", *GENERAL}
    assert shared <= set(inspect.signature(RigL).parameters)
    assert inspect.signature(RigL).parameters["distribution"].default == "erk"
    assert "storage" not in inspect.signature(SNFS).parameters, "it needs dense gradients"


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        (DST, ["alpha"]),
        (lightning_sparse.DFBST, ["alpha", "beta"]),
        (AutoSparse, ["alpha"]),
        (STR, ["init_threshold"]),
        (TopKAST, ["sparsity", "backward_sparsity"]),
        (RigL, ["sparsity"]),
        (lightning_sparse.GMP, ["sparsity"]),
        (lightning_sparse.LotteryTicket, ["sparsity"]),
    ],
)
def test_the_first_arguments_may_be_given_without_a_name(kind, first):
    parameters = inspect.signature(kind).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == first


def test_the_repr_shows_what_differs_from_the_defaults():
    assert repr(RigL(0.9)) == "RigL(sparsity=0.9)"
    assert repr(RigL(0.9, update_every="auto", exclude=[], seed=3)) == "RigL(sparsity=0.9, seed=3)"
    assert repr(DST(5e-4, exclude=["*.head.weight"])) == "DST(alpha=0.0005, exclude=['*.head.weight'])"


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_argument_is_refused_by_the_method_that_was_called_with_what_it_takes(method):
    with pytest.raises(
        TypeError, match=rf"^{method} got an unexpected keyword argument 'exlude'\. Did you mean "
    ) as error:
        METHODS[method](exlude=["net.0.weight"])
    taken = str(error.value).split("It takes: ")[1].rstrip(".").split(", ")
    assert taken == list(inspect.signature(getattr(lightning_sparse, method)).parameters)


def test_the_nearest_argument_is_named_and_those_that_a_method_sets_itself_are_not():
    with pytest.raises(
        TypeError, match=r"^RigL got .* 'sparsty'\. Did you mean 'sparsity'\? It takes: sparsity, drop_"
    ):
        RigL(sparsty=0.9)
    with pytest.raises(TypeError, match=r"^RigL got .* 'drop_share'\. It takes"):
        RigL(0.9, drop_share=0.5)
    with pytest.raises(TypeError, match=r"^SNFS got an unexpected .* 'storage'\. It takes: (?!.*storage)"):
        SNFS(0.9, storage="sparse")
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'granularity'"):
        OptG(0.9, granularity="layer")


class Own(RigL):
    """A user's method with a constructor of its own."""

    def __init__(self, *args, own=0, **options):
        super().__init__(*args, **options)
        self.own = own


class Declared(RigL):
    """A user's method that declares its option."""

    own: int = option(default=0, doc="of the user.")


def test_other_mistakes_of_a_call_are_told_by_name():
    with pytest.raises(TypeError, match=r"^RigL got multiple values for the argument 'sparsity'"):
        RigL(0.9, sparsity=0.9)
    with pytest.raises(TypeError, match=r"^SNIP is missing the argument 'sparsity': share of zeros"):
        SNIP()
    with pytest.raises(TypeError, match=r"^RigL takes sparsity without a name, got 2 such arguments\. Name the others"):
        RigL(0.9, 0.3)
    with pytest.raises(ValueError, match=r"^decay must be one of \['cosine', 'halving', 'linear'"):
        RigL(0.9, decay="fast")


@pytest.mark.parametrize("kind", [Own, Declared])
def test_a_method_may_have_its_own_constructor_or_declare_more(kind):
    assert kind(0.9, own=3).own == 3
    assert repr(kind(0.9, own=3)) == f"{kind.__name__}(sparsity=0.9, own=3)"
    with pytest.raises(TypeError, match=f"^{kind.__name__} got an unexpected keyword argument 'owm'"):
        kind(0.9, owm=3)


@pytest.mark.parametrize("method", METHODS)
def test_methods_can_be_copied(method):
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


class Base(Options):
    """Base."""

    rate: float = option(kw_only=False, doc="share kept.")
    steps: int = option(default=3, doc="how many.")


def test_a_subclass_changes_a_default_removes_an_option_and_keeps_the_text():
    class Quick(Base):
        """Quick."""

        steps: int = 1

    class Still(Base):
        """Still."""

        steps: int = fixed(default=0)

    assert str(inspect.signature(Quick)) == "(rate: float, *, steps: int = 1) -> None"
    assert "steps: how many." in inspect.getdoc(Quick)
    assert str(inspect.signature(Still)) == "(rate: float) -> None"
    assert Still(0.5).steps == 0


def test_only_one_of_the_names_that_the_type_lists_is_taken():
    class Kinds(Options):
        """Kinds."""

        one: Literal["a", "b"] | None = option(default=None, doc="a name.")
        several: list[Literal["a", "b"]] = option(default=["a"], doc="names.")

    assert (Kinds(one="b").one, Kinds().one, Kinds(several=["b"]).several) == ("b", None, ["b"])
    with pytest.raises(ValueError, match=r"^one must be one of \['a', 'b'\], got 'c'"):
        Kinds(one="c")


def test_an_argument_of_another_name_than_its_field_is_declared_with_it_again():
    with pytest.raises(TypeError, match=r"Mine\.sparsity_target must be declared .*alias='sparsity'"):

        class Mine(RigL):
            sparsity_target: float = option(doc="other words.")


def test_a_method_that_lacks_a_verb_fails_when_it_is_constructed_with_its_name():
    from lightning_sparse.families.prune_and_grow import PruneAndGrow

    class Misspelt(PruneAndGrow):
        def growth(self, weight, n, dropped):
            return weight.largest_gradients(n)[0]

    with pytest.raises(TypeError, match=r"Misspelt.*abstract.*grow"):
        Misspelt(0.9)


def test_swat_takes_no_argument_of_thresholds():
    assert "granularity" not in inspect.signature(SWAT).parameters
