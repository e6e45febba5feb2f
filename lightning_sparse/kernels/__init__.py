"""The arithmetic of thresholds and products with sparse matrices: in torch, or in compiled code where that is quicker.

``thresholds`` and ``products`` say what there is to compute, ``dispatch`` which code computes it.
"""
