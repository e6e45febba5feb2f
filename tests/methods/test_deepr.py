"""DeepR: signs, the l1 term and the noise."""

import pytest
import torch
from by_hand import W, graded
from helpers import Lit, attached, mlp, seeded, watched

from lightning_sparse import DeepR

# ---------------------------------------------------------------------- worked out by hand


def test_deepr_moves_the_connections_whose_sign_has_changed():
    callback = DeepR(0.5, l1=0.0, temperature=0.0)
    module, _, weights = attached(callback, {"a": [[0.5, -0.2, 1.0, -1.0]]}, {"a": [[1, 1, 0, 0]]})
    optimizer = weights[0].optimizer
    module["a"].data = torch.tensor([[0.5, -0.2, 0.0, 0.0]])
    graded(module, {"a": [[1.2, 0.0, 9.0, 9.0]]})  # 0.5 becomes -0.1
    callback.before_step(optimizer, 1.0, 1.0)
    optimizer.step()
    callback.after_update(optimizer)
    assert weights[0].num_active == 2
    assert weights[0].mask[0, :2].tolist() == [False, True]
    new = int(weights[0].mask[0, 3]) + 2
    assert module["a"][0, new] == torch.tensor([1e-12, -1e-12])[new - 2], "small, and with the sign of its place"
    assert module["a"].data.count_nonzero() == 2


def test_deeprs_l1_term_shrinks_active_weights_by_lr_times_l1():
    callback = DeepR(0.5, l1=0.25, temperature=0.0)
    module, _, weights = attached(callback, {"a": [[0.5, -0.25, 1.0, -1.0]]}, {"a": [[1, 1, 0, 0]]})
    graded(module, {"a": [[0.0] * 4]})
    callback.before_step(weights[0].optimizer, 1.0, 1.0)
    weights[0].optimizer.step()
    callback.after_update(weights[0].optimizer)
    assert module["a"].tolist() == [[0.375, -0.125, 0.0, 0.0]]


def test_deeprs_noise_has_the_variance_of_its_temperature():
    callback = DeepR(0.5, l1=0.0, temperature=0.04)
    module, _, weights = attached(callback, {"a": [[100.0] * 100] * 100})
    graded(module, {"a": [[0.0] * 100] * 100})
    callback.before_step(weights[0].optimizer, 1.0, 1.0)
    weights[0].optimizer.step()
    callback.after_update(weights[0].optimizer)
    assert module["a"].detach().std() == pytest.approx((2 * 0.5 * 0.04) ** 0.5, rel=0.03)


def test_deepr_keeps_weights_that_no_step_has_updated():
    callback = DeepR(0.5, l1=0.25, temperature=1.0)
    module, _, weights = attached(callback, W)
    before = module["a"].data.clone()
    callback.before_step(weights[0].optimizer, 0.0, 1.0)
    callback.after_update(weights[0].optimizer)
    assert torch.equal(module["a"], before)


# ---------------------------------------------------------------------- ITOP, MEST, DeepR


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_deepr_keeps_signs(scope):
    watch, module, _ = watched(DeepR(0.8, l1=0.01, temperature=1e-4, scope=scope), batches=40)
    start = {name: p.detach() > 0 for name, p in seeded(lambda: Lit(mlp())).named_parameters()}
    assert (len({tuple(counts) for counts in watch.counts}) == 1) is (scope == "layer")
    for name, mask in watch.callback.masks.items():
        W = module.get_parameter(name)
        assert torch.equal(W[mask] > 0, start[name][mask])
        assert torch.equal(W != 0, mask)
        assert not torch.equal(mask, watch.masks[0][name])


def test_deepr_rewires_a_dense_layer_in_place():
    """No other place is left, so the connection that flipped starts anew."""
    watch, module, _ = watched(DeepR(0.0, l1=0.05, temperature=1e-4), batches=20)
    assert {sum(counts) for counts in watch.counts} == {392}
    start = seeded(lambda: Lit(mlp())).get_parameter("net.0.weight") > 0
    assert torch.equal(module.net[0].weight > 0, start)
