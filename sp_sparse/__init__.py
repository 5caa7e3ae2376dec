"""Block-sparse attention under sequence parallelism."""
