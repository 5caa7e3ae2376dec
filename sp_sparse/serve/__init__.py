"""A video server for one model on the ranks of one job: `python -m sp_sparse.serve`, `torchrun … -m sp_sparse.serve`.

Wan is known to `wan` and `command` alone, and to the arguments; the rest serves any `VideoBackend`.
"""
