"""A compiled module trains to the same result as an eager one."""

import pytest
import torch
from helpers import LATENT, SETTINGS, THRESHOLDS, Lit, cnn, effective, fit, seeded


@pytest.mark.parametrize("method", [*LATENT, "RigL", "SNIP"])
@pytest.mark.parametrize(("what", "accumulate"), [("module", 1), ("net", 4)])
def test_compiled_module_trains_as_the_eager_one(method, what, accumulate):
    torch._dynamo.reset()
    eager, compiled = SETTINGS[method](), SETTINGS[method]()
    plain, _ = fit(eager, seeded(lambda: Lit(cnn())), max_epochs=1, accumulate_grad_batches=accumulate)
    module = seeded(lambda: Lit(cnn()))
    if what == "net":
        module.net = torch.compile(module.net, backend="aot_eager")
    given = torch.compile(module, backend="aot_eager") if what == "module" else module
    fit(compiled, given, max_epochs=1, accumulate_grad_batches=accumulate)
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
