"""Independent references: the methods as autograd graphs, written from the papers. No code shared with the package.

Effective weights are built inside the graph from latent weights and thresholds, with the papers' surrogate derivatives
as ``torch.autograd.Function``; the loss, its penalty and all gradients are autograd's own.
"""

import math

import torch
from torch.func import functional_call


class Step(torch.autograd.Function):
    """Unit step (1 at or above the origin, or only above it) with the long-tailed derivative."""

    @staticmethod
    def forward(ctx, x, at_zero):
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype) if at_zero else (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        a = x.abs()
        h = torch.where(a <= 0.4, 2 - 4 * a, torch.where(a <= 1, torch.full_like(a, 0.4), torch.zeros_like(a)))
        return grad * h, None


class PositiveAbs(torch.autograd.Function):
    """|t| with derivative +1 at 0."""

    @staticmethod
    def forward(ctx, t):
        ctx.save_for_backward(t)
        return t.abs()

    @staticmethod
    def backward(ctx, grad):
        (t,) = ctx.saved_tensors
        return torch.where(t < 0, -grad, grad)


class AnnealedRelu(torch.autograd.Function):
    """max(x, 0) with derivative alpha below 0, and none outside of ``allowed``."""

    @staticmethod
    def forward(ctx, x, alpha, allowed):
        ctx.save_for_backward(x, allowed)
        ctx.alpha = alpha
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        x, allowed = ctx.saved_tensors
        return grad * torch.where(x > 0, torch.ones_like(x), torch.full_like(x, ctx.alpha)) * allowed, None, None


def broadcast(t, W):
    """Thresholds per neuron, layer or weight, against W."""
    if t.shape == W.shape:
        return t
    return t.view(-1, *[1] * (W.ndim - 1))


class Reference:
    """A module whose weights ``names`` train sparse, with everything in one autograd graph.

    ``method`` is the callback's name, ``options`` its arguments.
    """

    def __init__(self, module, names, method, granularity, **options):
        self.module, self.names, self.method, self.options = module, names, method, options
        self.alpha_now = options.get("alpha", 0.0)
        parameters = dict(module.named_parameters())
        self.W = {name: parameters[name].detach().clone().requires_grad_() for name in names}
        self.rest = {name: p for name, p in parameters.items() if name not in names}
        start = {"AutoSparse": options.get("init_threshold", -5.0), "STR": options.get("init_threshold")}.get(method, 0)
        shape = {
            "neuron": lambda W: (len(W),),
            "layer": lambda W: (1,),
            "weight": lambda W: W.shape,
        }[granularity]
        self.t = {n: torch.full(shape(W), float(start), dtype=W.dtype, requires_grad=True) for n, W in self.W.items()}
        self.t_b = {n: torch.zeros_like(t, requires_grad=True) for n, t in self.t.items()}

    def trained(self):
        extra = self.t_b.values() if self.method == "DFBST" else ()
        return [*self.W.values(), *self.rest.values(), *self.t.values(), *extra]

    def effective(self, name):
        W, t = self.W[name], broadcast(self.t[name], self.W[name])
        if self.method == "DST":
            return W * Step.apply(W.abs() - t, False)
        if self.method == "DFBST":
            return W * Step.apply(W.abs() - PositiveAbs.apply(t), False)
        T = torch.sigmoid(t)
        allowed = torch.ones_like(W)
        density = self.options.get("backward_density")
        if density is not None:
            size = max(round(density * W.numel()), int((W.abs() > T).sum()))
            kept = sorted(range(W.numel()), key=lambda i: -W.detach().abs().flatten()[i].item())[:size]
            allowed = torch.zeros(W.numel(), dtype=W.dtype)
            allowed[kept] = 1
            allowed = allowed.view_as(W)
        return W.sign() * AnnealedRelu.apply(W.abs() - T, self.alpha_now, allowed)

    def loss(self, compute):
        """``compute(model_call)`` plus the regulariser."""
        weights = {name: self.effective(name) for name in self.names}
        loss = compute(lambda *x: functional_call(self.module, {**self.rest, **weights}, x))
        if self.method in ("DST", "DFBST"):
            loss = loss + self.options["alpha"] * sum(torch.exp(-t).sum() for t in self.t.values())
        return loss

    def mask_gradients(self, share=1.0):
        """DFBST: G~ into the latent weights' gradients, and the variance penalty's gradient into t_b.

        ``share``: of the accumulation window that was filled; micro-batches carry it in their loss.
        """
        if self.method != "DFBST":
            return
        flat, masks = [], {}
        for name, W in self.W.items():
            G = W.grad.detach()
            rows = G.flatten(1).abs().sum(1)
            scores = G.abs() / torch.where(rows == 0, torch.ones_like(rows), rows).view(-1, *[1] * (G.ndim - 1))
            M = Step.apply(scores - PositiveAbs.apply(broadcast(self.t_b[name], W)), True)
            masks[name] = M
            flat.append((G * M).flatten())
        penalty = share * self.options["beta"] * torch.cat(flat).std()
        for t_b, grad in zip(self.t_b.values(), torch.autograd.grad(penalty, list(self.t_b.values())), strict=True):
            t_b.grad = grad
        for name, W in self.W.items():
            W.grad = W.grad * masks[name].detach()
        self.M_b = {name: M.detach() != 0 for name, M in masks.items()}

    @torch.no_grad()
    def guard(self, bound=0.99):
        if self.method in ("DST", "DFBST"):
            for name, W in self.W.items():
                t = broadcast(self.t[name], W)
                if (W.abs() <= (t.abs() if self.method == "DFBST" else t)).double().mean() > bound:
                    self.t[name].zero_()

    def anneal(self, epoch, epochs):
        """Sigmoid-cosine, the default."""
        if self.method == "AutoSparse":
            cosine = (1 + math.cos(math.pi * epoch / epochs)) / 2
            sigmoid = 1 - 1 / (1 + math.exp(6 - 12 * epoch / epochs))
            self.alpha_now = self.options["alpha"] * max(cosine, sigmoid)
        elif self.method == "STR":
            self.alpha_now = 0.0

    @torch.no_grad()
    def masks(self):
        return {name: self.effective(name) != 0 for name in self.names}
