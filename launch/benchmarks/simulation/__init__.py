"""A model of what a layer costs on more GPUs than there are: recorded masks replayed on measured costs."""
