"""The words for options that several families have."""

__all__ = ["DISTRIBUTION", "FINAL_SPARSITY", "MIN_LAYER_DENSITY", "SCOPE", "SPARSITY"]

SPARSITY = "share of zeros over all selected weights, in [0, 1)."

FINAL_SPARSITY = "share of zeros at the end over all selected weights, in [0, 1)."

DISTRIBUTION = (
    'how the active weights are divided among layers: ``"erk"``, ``"er"``, ``"uniform"``, ``"uniform_first_dense"``, '
    "or a density for each glob pattern on parameter names."
)

MIN_LAYER_DENSITY = "no layer falls below this density."

SCOPE = (
    'compare the weights of all layers (``"global"``), or of each ``"layer"`` by itself, as many as ``distribution`` '
    "gives it."
)
