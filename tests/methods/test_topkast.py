"""TopKAST against an independent reference in autograd, its sets by hand, and its limits."""

import copy

import pytest
import torch
from helpers import Lit, cnn, data, fit, loader, mlp, seeded, trainer
from torch.func import functional_call
from torch.optim.lr_scheduler import StepLR

from lightning_sparse import TopKAST

EPOCHS = {1: 2, 4: 4}  # by the number of batches a step


class Chosen(torch.autograd.Function):
    """``W`` on A; backward the gradient times 1 on A, alpha on the rest of B, 0 elsewhere."""

    @staticmethod
    def forward(ctx, W, A, B, alpha):
        ctx.factor = A + alpha * (B & ~A)
        return torch.where(A, W, torch.zeros_like(W))

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None, None, None


def first(values, k):
    """Positions of the k largest, by sorting in Python."""
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]] = True
    return mask


class Reference:
    """Top-KAST with everything in one graph: latent v, the penalty in the loss, sets by sorting."""

    def __init__(self, net, sparsity, backward_sparsity, power, l2, scope, every):
        self.net, self.power, self.l2, self.scope, self.every = net, power, l2, scope, every
        self.densities = 1 - sparsity, 1 - backward_sparsity
        self.W = {}
        self.rest = {}
        for name, p in net.named_parameters():
            if p.ndim > 1:
                self.W[name] = (p.detach().sign() * p.detach().abs() ** (1 / power)).requires_grad_()
            else:
                self.rest[name] = p
        self.steps, self.moved = 0, False
        self.sets()

    def sets(self):
        values = {n: W.detach().abs().flatten().tolist() for n, W in self.W.items()}
        sizes = [len(v) for v in values.values()]
        kept = [round(density * sum(sizes)) for density in self.densities]
        found = []
        for index, k in enumerate(kept):
            if self.scope == "global":
                mask = first([x for v in values.values() for x in v], k)
                found.append(dict(zip(values, mask.split(sizes), strict=True)))
            else:
                # one density for each layer, the fractions to the largest remainders; B: what A leaves, likewise
                held = [int(found[0][n].sum()) for n in values] if index else [0] * len(sizes)
                room = [size - h for size, h in zip(sizes, held, strict=True)]
                exact = [(k - sum(held)) * r / sum(room) for r in room]
                counts = [int(e) for e in exact]
                order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
                for i in order[: k - sum(held) - sum(counts)]:
                    counts[i] += 1
                found.append({n: first(v, c + h) for (n, v), c, h in zip(values.items(), counts, held, strict=True)})
        old_A = getattr(self, "A", None)
        shaped = [{n: mask.view_as(self.W[n]) for n, mask in masks.items()} for masks in found]
        old = getattr(self, "B", None)
        self.A, self.B = shaped
        self.moved = self.moved or (old_A is not None and any(not torch.equal(A, old_A[n]) for n, A in self.A.items()))
        self.entered = {n: B & ~old[n] for n, B in self.B.items()} if old else {}

    def weight(self, name, alpha):
        v = self.W[name]
        W = v * v.abs() ** (self.power - 1) if self.power != 1 else v
        return Chosen.apply(W, self.A[name], self.B[name], alpha)

    def loss(self, x, y, alpha):
        weights = {name: self.weight(name, alpha) for name in self.W}
        loss = torch.nn.functional.cross_entropy(functional_call(self.net, {**self.rest, **weights}, x), y)
        for name, v in self.W.items():
            A, more = self.A[name], self.B[name] & ~self.A[name]
            loss = loss + self.l2 / 2 * (v[A].square().sum() + v[more].square().sum() / self.densities[0])
        return loss

    def step(self, optimizer):
        before = {name: v.detach().clone() for name, v in self.W.items()}
        optimizer.step()
        self.steps += 1
        with torch.no_grad():
            for name, v in self.W.items():
                v[~self.B[name]] = before[name][~self.B[name]]
            if self.steps % self.every == 0:
                self.sets()
                for name, entered in self.entered.items():
                    optimizer.state[self.W[name]]["momentum_buffer"][entered] = 0


def train_reference(reference, accumulate, alpha, epochs):
    x, y = data(240, torch.float64)
    trained = [*reference.W.values(), *reference.rest.values()]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = StepLR(optimizer, 1, gamma=0.9)
    for epoch in range(epochs):
        optimizer.zero_grad()
        for i in range(30):
            batch = slice(8 * i, 8 * i + 8)
            (reference.loss(x[batch], y[batch], alpha * (1 - epoch / epochs)) / accumulate).backward()
            if (i + 1) % accumulate == 0 or i == 29:
                reference.step(optimizer)
                optimizer.zero_grad()
        scheduler.step()


CASES = {
    "plain": {"backward_sparsity": 0.5},
    "annealed": {"backward_sparsity": 0.4, "alpha": 0.8},
    "all updated": {"backward_sparsity": 0.0, "l2": 1e-3},
    "powerpropagation": {"backward_sparsity": 0.5, "power": 2.0},
    "global": {"backward_sparsity": 0.5, "scope": "global", "update_every": 4},
}


@pytest.mark.parametrize(("net", "accumulate"), [(mlp, 1), (cnn, 4)])
@pytest.mark.parametrize("case", CASES)
def test_trains_as_the_autograd_reference(case, net, accumulate):
    given = {"sparsity": 0.8, "l2": 3e-2, **CASES[case]}
    options = {"power": 1.0, "scope": "layer", "update_every": 1, "alpha": 1.0, **given}
    epochs = EPOCHS[accumulate]
    alpha, every = options.pop("alpha"), options.pop("update_every")
    reference = Reference(seeded(lambda: net(torch.float64)), **options, every=every)
    train_reference(reference, accumulate, alpha, epochs)

    callback = TopKAST(**given, decay="linear", scale_init=False)
    module = Lit(seeded(lambda: net(torch.float64)), scheduler=lambda opt: StepLR(opt, 1, gamma=0.9))
    run = trainer(callback, max_epochs=epochs, accumulate_grad_batches=accumulate)
    run.fit(module, loader(dtype=torch.float64))

    for name, v in reference.W.items():
        ours = callback.latents[f"net.{name}"]
        assert (ours - v.detach()).abs().max() <= 1e-5 * v.detach().abs().max()
        assert torch.equal(callback.masks[f"net.{name}"], reference.A[name])
        assert torch.equal(callback.backward_masks[f"net.{name}"], reference.B[name])
    for name, p in reference.rest.items():
        assert torch.allclose(module.net.get_parameter(name), p, rtol=1e-5, atol=1e-8)
    assert reference.moved, "the test would prove nothing"


def test_all_forward_and_backward_is_dense_training_to_the_last_bit():
    callback = TopKAST(0.0, 0.0, l2=0.0)
    module, _ = fit(callback, seeded(lambda: Lit(cnn())))
    dense, _ = fit([], seeded(lambda: Lit(cnn())))
    assert callback.density == callback.backward_density == 1
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("sparsity", "backward"), [(0.9, 0.77), (0.333, 0.1), (0.8, 0.8)])
def test_counts_are_exact_after_every_update_and_the_sets_nested(sparsity, backward, scope):
    callback = TopKAST(sparsity, backward, scope=scope, min_layer_density=0.02)

    class Looks(Lit):
        def on_train_batch_end(self, *args):
            A, B = callback.masks, callback.backward_masks
            assert sum(int(m.sum()) for m in A.values()) == 392 - round(sparsity * 392)
            assert sum(int(m.sum()) for m in B.values()) == 392 - round(backward * 392)
            assert not any((A[name] & ~B[name]).any() for name in A)
            for name, W in callback.latents.items():
                assert W[A[name]].abs().min() >= W[~A[name]].abs().max(), "the largest compute"
            self.seen.append({name: mask.clone() for name, mask in B.items()})

    module = seeded(Looks)
    module.seen = []
    fit(callback, module)
    assert any(not torch.equal(B, module.seen[-1][name]) for name, B in module.seen[0].items())


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_outside_of_b_nothing_moves_whatever_momentum_and_weight_decay(optimizer):
    """With sets that stay, what is outside keeps its very bits, and the rest moves."""
    build = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    }[optimizer]
    callback = TopKAST(0.8, 0.5, update_every=10**6, scale_init=False)
    module = seeded(lambda: Lit(optimizer=build))
    before = {f"net.{name}": p.detach().clone() for name, p in module.net.named_parameters()}
    fit(callback, module)
    for name, W in callback.latents.items():
        A, B = callback.masks[name], callback.backward_masks[name]
        assert torch.equal(W[~B], before[name][~B])
        assert (W[B & ~A] != before[name][B & ~A]).any(), "explored without being computed with"
        assert torch.equal(module.get_parameter(name), torch.where(A, W, torch.zeros_like(W)))


@pytest.mark.parametrize("net", [mlp, cnn])
def test_what_enters_b_has_no_momentum_and_the_scale_of_its_neurons_others(net):
    seen = []

    class Sees(TopKAST):
        def choose(self, weights, updates):
            before = {w.name: w.buffers["B"] for w in weights}
            optimizer = self._fit.optimizers[0] if self._fit.optimizers else None
            held = {w.name: dict(optimizer.state[w.parameter]) for w in weights} if optimizer else {}
            seen.append((before, {n: {k: v.clone() for k, v in state.items()} for n, state in held.items()}))
            super().choose(weights, updates)

        def updated(self, optimizer, weights):
            super().updated(optimizer, weights)
            if self._groups[id(optimizer)].updates == 4:
                self.after = {w.name: (w.buffers["B"], dict(optimizer.state[w.parameter])) for w in weights}
                self.after = copy.deepcopy(self.after)

    callback = Sees(0.8, 0.5, update_every=4)
    fit(
        callback,
        seeded(lambda: Lit(net(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.05))),
        loader(40),
        max_epochs=1,
    )
    befores, states = seen[1]
    entered = 0
    for name, (B, state) in callback.after.items():
        before, theirs = befores[name], states[name]
        rows = zip(
            *(x.flatten(1) for x in (B, before, theirs["exp_avg_sq"], state["exp_avg_sq"], state["exp_avg"])),
            strict=True,
        )
        for b, was, old, new, momentum in rows:
            staying, entering = b & was, b & ~was
            assert torch.equal(new[~entering], old[~entering])
            entered += int(entering.sum())
            if entering.any() and staying.any():
                assert torch.allclose(new[entering], old[staying].mean().expand(int(entering.sum())))
                assert not momentum[entering].any()
    assert entered > 3


class Look(Lit):
    """Keeps the gradients that the optimizer gets."""

    def on_before_zero_grad(self, optimizer):
        grad = self.net[0].weight.grad
        if grad is not None:
            self.gradient = grad.clone()


def test_gradients_outside_of_b_are_zero_and_the_penalty_is_stronger_outside_of_a():
    class Flat(Look):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0

    callback = TopKAST(0.75, 0.5, l2=0.1, alpha=0.3, update_every=10**6)
    module = seeded(lambda: Flat(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)))
    fit(callback, module, limit_train_batches=2, max_epochs=1)
    W = callback.latents["net.0.weight"]
    A, B = callback.masks["net.0.weight"], callback.backward_masks["net.0.weight"]
    assert torch.allclose(module.gradient[A], 0.1 * W[A])
    assert torch.allclose(module.gradient[B & ~A], 0.1 / 0.25 * W[B & ~A])
    assert (module.gradient[~B] == 0).all()


def test_powerpropagation_starts_from_the_given_weights():
    callback = TopKAST(0.5, 0.0, power=3.0, scale_init=False)
    module = seeded(lambda: Lit(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)))
    before = {f"net.{name}": p.detach().clone() for name, p in module.net.named_parameters()}
    fit(callback, module, max_epochs=1)
    for name, A in callback.masks.items():
        assert torch.allclose(module.get_parameter(name)[A], before[name][A], rtol=1e-5)
        v = callback.latents[name]
        assert torch.allclose(v * v.abs() ** 2, before[name], rtol=1e-5)


def test_layer_counts_follow_the_distribution():
    callback = TopKAST(0.8, 0.5, distribution={"net.4.*": 0.5})
    fit(callback, max_epochs=1)
    assert callback.layer_density["net.4.weight"] == 0.5
    assert callback.density == (392 - round(0.8 * 392)) / 392


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be below 1, got 1.0"),
        ({"sparsity": -0.1}, "sparsity must be a number from 0 to 1, got -0.1"),
        ({"backward_sparsity": 0.9}, r"backward_sparsity must be at most sparsity=0.8, got 0.9: .* Lower it"),
        ({"backward_sparsity": "x"}, "backward_sparsity must be a number from 0 to 1"),
        ({"alpha": 1.5}, "alpha must be a number from 0 to 1, got 1.5"),
        ({"decay": "square"}, "decay must be one of .* got 'square'"),
        ({"power": 0.5}, "power must be a finite number of at least 1, got 0.5"),
        ({"l2": -1}, "l2 must be a finite number of at least 0, got -1"),
        ({"scope": "row"}, r"scope must be one of \['global', 'layer'\], got 'row'"),
        ({"update_every": 0}, "update_every must be an integer of at least 1, got 0"),
        ({"distribution": "even"}, "distribution must be one of"),
        ({"distribution": {"a": 2}}, "distribution must be a number from 0 to 1, got 2"),
        ({"min_layer_density": 2}, "min_layer_density must be a number from 0 to 1, got 2"),
        ({"decay_rate": -1}, "decay_rate must be a finite number of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TopKAST(**{"sparsity": 0.8, "backward_sparsity": 0.5, **options})


def test_a_floor_above_the_budget_is_refused_when_fit_starts():
    with pytest.raises(ValueError, match=r"min_layer_density=0.5 alone takes 196 weights, the budget is 78"):
        fit(TopKAST(0.8, 0.5, scope="global", min_layer_density=0.5))
