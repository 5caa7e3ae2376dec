"""Measures what sparsity does to a checkpoint's videos: `torchrun … -m sp_sparse.fidelity --model … --prompts FILE …`."""
