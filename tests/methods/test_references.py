"""Each method trains as an independent autograd reference does: latent weights, thresholds and masks."""

import pytest
import torch
from helpers import SETTINGS, THRESHOLDS, Lit, cnn, data, loader, mlp, seeded, trainer
from reference import Reference
from torch.optim.lr_scheduler import StepLR

EPOCHS = {1: 2, 4: 4}  # by the number of batches a step
OPTIONS = {
    "DST": {"alpha": 5e-3},
    "DFBST": {"alpha": 5e-3, "beta": 0.5},
    "AutoSparse": {"alpha": 0.6, "init_threshold": -2.5},
    "STR": {"init_threshold": -2.5},
}


def close(ours, reference):
    """Agreement within 1e-5 relative to the largest element."""
    scale = max(reference.abs().max().item(), 1e-3)
    return (ours - reference).abs().max().item() <= 1e-5 * scale


def train_reference(net, names, method, granularity, accumulate, options):
    x, y = data(240, torch.float64)
    reference = Reference(net, names, method, granularity, **options)
    optimizer = torch.optim.SGD(reference.trained(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    per_epoch, epochs = 30, EPOCHS[accumulate]
    for epoch in range(epochs):
        reference.anneal(epoch, epochs)
        optimizer.zero_grad()
        for i in range(per_epoch):
            batch = slice(8 * i, 8 * i + 8)
            loss = reference.loss(lambda call, b=batch: torch.nn.functional.cross_entropy(call(x[b]), y[b]))
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == per_epoch:
                reference.mask_gradients((i % accumulate + 1) / accumulate)
                optimizer.step()
                reference.guard()
                optimizer.zero_grad()
        scheduler.step()
    return reference, epochs


@pytest.mark.parametrize(("net", "accumulate"), [(mlp, 1), (cnn, 4)])
@pytest.mark.parametrize("method", THRESHOLDS)
def test_trains_as_the_autograd_reference(method, net, accumulate, kernel):
    check(method, net, accumulate, "layer" if method in ("AutoSparse", "STR") else "neuron", {})


@pytest.mark.parametrize("granularity", ["neuron", "layer", "weight"])
@pytest.mark.parametrize("method", THRESHOLDS)
def test_every_granularity_trains_as_the_reference(method, granularity):
    # a single threshold a layer feels alpha once, not once a neuron
    check(method, cnn, 1, granularity, {"alpha": 2e-2} if (method, granularity) == ("DST", "layer") else {})


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_backward_density_trains_as_the_reference(density):
    check("AutoSparse", mlp, 1, "layer", {"backward_density": density})


def check(method, net, accumulate, granularity, more):
    options = {**OPTIONS[method], **more}
    module = Lit(seeded(lambda: net(torch.float64)), scheduler=lambda opt: StepLR(opt, 1, gamma=0.5))
    names = [name for name, p in module.net.named_parameters() if p.ndim > 1]
    twin = seeded(lambda: net(torch.float64))
    reference, epochs = train_reference(twin, names, method, granularity, accumulate, options)

    callback = SETTINGS[method](granularity=granularity, **more)
    run = trainer(callback, max_epochs=epochs, accumulate_grad_batches=accumulate)
    run.fit(module, loader(dtype=torch.float64))

    assert set(callback.masks) == {f"net.{name}" for name in names}
    assert 0.02 < callback.sparsity < 0.98, "the test would prove nothing"
    masks = reference.masks()
    for name in names:
        assert close(callback.latents[f"net.{name}"], reference.W[name].detach())
        assert close(callback.thresholds[f"net.{name}"], reference.t[name].detach())
        assert torch.equal(callback.masks[f"net.{name}"], masks[name])
        if method == "DFBST":
            assert close(callback.backward_thresholds[f"net.{name}"], reference.t_b[name].detach())
            assert torch.equal(callback.backward_masks[f"net.{name}"], reference.M_b[name])
    for name, p in module.net.named_parameters():
        if name in reference.rest:
            assert close(p.detach(), reference.rest[name].detach())


def test_autosparse_without_gradient_for_inactive_weights_is_str_exactly():
    results = []
    for callback in (SETTINGS["AutoSparse"](alpha=0.0), SETTINGS["STR"]()):
        module = seeded(Lit)
        trainer(callback).fit(module, loader())
        results.append((callback.latents, callback.thresholds, module.state_dict()))
    for ours, theirs in zip(*results, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
