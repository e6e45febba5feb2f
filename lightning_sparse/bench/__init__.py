"""Benchmarks: ratios measured in one run, sparse and dense in turn, so that a change of the machine's speed cancels.

``python -m lightning_sparse.bench overhead`` times a bare training step with each method against a dense one,
``... trainer`` the same in a Lightning Trainer, ``... compile`` compiled by inductor against eager; ``... hooks`` shows
the cost of Lightning's hooks alone, ``... memory`` the peak memory, ``... update`` the time in which methods of prune
and grow move connections (``--storages masked,sparse``), ``... ranking`` that of GGR's allocation among layers alone,
``... storage`` time and memory of truly sparse layers, ``... fit`` the same for a whole fit in a Trainer,
``... launches`` how many operations a method adds to a step, ``... traffic`` what two processes
send in a step, ``... monitor`` the share of SparsityMonitor in the time of an epoch.
``... gpu --device cuda`` does all that only a GPU shows. ``--help`` lists the options.
"""
