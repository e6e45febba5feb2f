"""The arithmetic of thresholds, sparse products and positions: in torch, or in compiled code where that is quicker.

``thresholds``, ``products`` and ``positions`` say what there is to compute, ``dispatch`` which code computes it.
"""
