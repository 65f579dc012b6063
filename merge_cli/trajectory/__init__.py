"""Facts about merging that a training run holds: statistics of its checkpoints, the loss model, the
forecast, the ledger.

Pure Python over at most a few thousand numbers, but for the ledger and the results of evaluations,
which are files. Weights are read elsewhere: this package begins at their inner products (`gram.py`)
and at measured losses (`ledger.py`).
"""
