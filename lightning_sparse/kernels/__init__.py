"""The arithmetic of thresholds, sparse products and convolutions: in torch, or in compiled code where that is quicker.

``thresholds``, ``products`` and ``convolutions`` say what there is to compute, ``dispatch`` which code computes it.
"""
