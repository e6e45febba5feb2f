"""Scores of missing links, worked out by hand and by the definition, path by path."""

import itertools
import math

import pytest
import torch

from lightning_sparse.rules import link_prediction
from lightning_sparse.rules.link_prediction import ch2_l3n, ch3_l3p, num_paths

# out of 3 outputs and 4 inputs; the missing link of output 0 and input 3 has two paths:
# 3 - output 1 - input 1 - 0, and 3 - output 2 - input 1 - 0
HAND = [[1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]]


def paths(A, v, u):
    """All pairs of an output and an input between input ``u`` and output ``v``."""
    ends = itertools.product(range(len(A)), range(len(A[0])))
    return [(z1, z2) for z1, z2 in ends if A[z1][u] and A[z1][z2] and A[v][z2]]


def by_definition(A, predictor):
    """The scores, with internal and external links counted one by one."""
    scores = {}
    for v, u in itertools.product(range(len(A)), range(len(A[0]))):
        if A[v][u]:
            continue
        found = paths(A, v, u)
        community = {("out", z1) for z1, _ in found} | {("in", z2) for _, z2 in found}
        internal, external = dict.fromkeys(community, 0), dict.fromkeys(community, 0)
        for a, b in itertools.product(range(len(A)), range(len(A[0]))):
            if A[a][b]:
                for node, other in ((("out", a), ("in", b)), (("in", b), ("out", a))):
                    if node in community:
                        internal[node] += other in community
                        external[node] += other not in community and other not in (("out", v), ("in", u))
        if predictor is ch3_l3p:
            scores[v, u] = sum(1 / math.sqrt((1 + external["out", z1]) * (1 + external["in", z2])) for z1, z2 in found)
        else:
            scores[v, u] = sum(internal[z] / (1 + external[z]) for z in community)
    return scores


def test_scores_by_hand():
    A = torch.tensor(HAND, dtype=torch.bool)
    # output 1 has no link out of the community, output 2 has one, input 1 none: 1 / sqrt(1) + 1 / sqrt(2)
    assert ch3_l3p(A)[0, 3].item() == pytest.approx(1 + 1 / math.sqrt(2))
    # output 1: 1 / 1, output 2: 1 / 2, input 1: 2 / 1
    assert ch2_l3n(A)[0, 3].item() == pytest.approx(3.5)
    assert num_paths(A) == sum(len(paths(HAND, v, u)) for v in range(3) for u in range(4))


@pytest.mark.parametrize("predictor", [ch3_l3p, ch2_l3n])
@pytest.mark.parametrize("at_once", [1, 1 << 20])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5])
def test_scores_are_those_of_the_definition(predictor, density, at_once, monkeypatch):
    monkeypatch.setattr(link_prediction, "_AT_ONCE", at_once)
    A = torch.rand(9, 13, generator=torch.Generator().manual_seed(1)) < density
    scores = predictor(A)
    assert scores.shape == A.shape
    expected = by_definition(A.int().tolist(), predictor)
    assert max(expected.values()) > 1 or not density, "proves nothing"
    for place, score in expected.items():
        assert scores[place].item() == pytest.approx(score, rel=1e-6)
    assert scores.isfinite().all()
