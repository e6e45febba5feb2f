from dataclasses import dataclass, field

from lightning_sparse.families.alternation import Alternation
from lightning_sparse.weights.group import WeightGroup


@dataclass
class Method:
    cycles: int = 2
    begin_at: float = 0.1
    last_dense: float = 0.1
    end_at: float = 0.8
    warnings: list = field(default_factory=list)

    def warn_once(self, message):
        self.warnings.append(message)


def test_a_group_is_sparse_and_dense_in_turn_and_has_no_phase_to_come_after_the_last():
    alternation, group = Alternation(Method()), WeightGroup()
    alternation.phases = alternation.divided(100, None)
    assert alternation.phases.begins == (10, 30, 50, 70, 80)
    sparse = []
    for group.step in range(100):
        if alternation.is_due(group):
            assert group.step in alternation.phases.begins
            alternation.begin(group)
        sparse.append(alternation.is_sparse(group))
        assert alternation.is_unfinished(group) == (group.step < 80)
    assert [sum(sparse[i : i + 10]) for i in range(0, 100, 10)] == [0, 10, 10, 0, 0, 10, 10, 0, 10, 10]
    assert alternation.is_last(group)


def test_what_an_earlier_fit_has_pruned_stays_sparse():
    alternation, group = Alternation(Method()), WeightGroup(step=60)
    alternation.phases = alternation.divided(100, None)
    alternation.begin_pruned(group)
    alternation.begin(group)
    assert alternation.is_sparse(group)
    assert not alternation.is_due(group)
    assert not alternation.is_unfinished(group)


def test_more_cycles_than_steps_are_fewer_and_warn():
    method = Method(cycles=50)
    assert Alternation(method).divided(20, None).begins == (*range(2, 13), 14, 16)
    assert "too few for its cycles" in method.warnings[0]
