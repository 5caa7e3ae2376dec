"""Making videos with Wan 2.2 on the ranks of one job: `python -m sp_sparse.generate`, `torchrun … -m sp_sparse.generate`."""
