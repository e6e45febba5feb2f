"""Small layers and gradients whose updates are worked out by hand."""

import torch


def graded(module, gradients):
    for name, dP in gradients.items():
        module[name].grad = torch.tensor(dP)


W = {"a": [[0.5, -0.2, 0.0, 0.0], [0.1, 0.0, -0.4, 0.0]]}
DP = {"a": [[9.0, 9.0, -3.0, 1.0], [9.0, 2.0, 9.0, -4.0]]}
TWO = {"a": [[0.5, -0.2, 0.0, 0.0], [0.1, 0.0, -0.4, 0.0]], "b": [[1.0, 0.3], [0.2, -0.1]]}
