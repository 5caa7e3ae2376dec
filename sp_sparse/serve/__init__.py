"""A video server for one model on the ranks of one torchrun job; it knows no model, only a `VideoBackend`."""
