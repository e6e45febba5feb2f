"""The arithmetic of thresholds, sparse products and convolutions, and positions: in torch, or compiled where quicker.

``thresholds``, ``products``, ``convolutions`` and ``positions`` say what there is to compute, ``dispatch`` which code
computes it.
"""
