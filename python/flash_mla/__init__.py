"""FlashMLA: fast multi-head latent attention decoding on NVIDIA Hopper GPUs and on CPUs.

`get_mla_metadata` and `flash_mla_with_kvcache` decode; `append_kv_cache`, `merge_states` and
`PagedKVCache` look after what is decoded; `info` says what this build can do on this machine. The
command line is `flash-mla`.
"""

from . import _library, _fake  # isort: skip  (the operators must exist before the modules that call them)
from ._info import collect as info
from .cache import PagedKVCache, append_kv_cache
from .flash_mla_interface import (
    FlashMLASchedMeta,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_decoding_metadata,
    get_mla_metadata,
    has_legacy,
)
from .merge import merge_states
from .unsupported import fused_norm_rope_attn_rope_cast

__version__ = _library.version()

__all__ = [
    "FlashMLASchedMeta",
    "PagedKVCache",
    "append_kv_cache",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "fused_norm_rope_attn_rope_cast",
    "get_mla_decoding_metadata",
    "get_mla_metadata",
    "has_legacy",
    "info",
    "merge_states",
]

del _fake
