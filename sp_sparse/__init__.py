"""Block-sparse attention under sequence parallelism: Ulysses, ring and hybrid give the single-device sparse result."""

from sp_sparse.attention import SparseAttention
from sp_sparse.config import SparseAttentionConfig
from sp_sparse.mask import BlockMask
from sp_sparse.parallel.mesh import SequenceParallelMesh
from sp_sparse.parallel.shards import SequenceShards
from sp_sparse.recorder import AttentionRecorder
from sp_sparse.schedule import Schedule
from sp_sparse.video import VideoGrid

__all__ = [
    "AttentionRecorder",
    "BlockMask",
    "Schedule",
    "SequenceParallelMesh",
    "SequenceShards",
    "SparseAttention",
    "SparseAttentionConfig",
    "VideoGrid",
]

__version__ = "0.1.0"
