"""Trains `mini`, a small Wan 2.2 that draws moving shapes from captions: `python -m launch.mini`, docs/mini.md."""
