"""Finding a selector by name."""

from __future__ import annotations

from sp_sparse.config import SparseAttentionConfig
from sp_sparse.plugins import Plugins
from sp_sparse.selection.base import Selector

SELECTORS = Plugins(
    "selector",
    "sp_sparse.selectors",
    {
        "topk": "sp_sparse.selection.topk:TopKSelector",
        "subblock": "sp_sparse.selection.subblock:SubblockSelector",
        "window": "sp_sparse.selection.window:WindowSelector",
    },
    methods=("summarize_queries", "summarize_keys", "select"),
)


def load_selector(config: SparseAttentionConfig) -> Selector:
    """The selector that `config` names: built in, an entry point of `sp_sparse.selectors`, or `package.module:Class`.

    Raises:
        ValueError: nothing has this name, or a configuration that the selector cannot serve.
    """
    selector: Selector = SELECTORS.load(config.selector)(config)
    return selector
