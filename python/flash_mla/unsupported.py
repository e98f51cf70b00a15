"""Published names that this release has for importing only: calling them says what is missing."""

from __future__ import annotations

from typing import Any

import torch


def _missing(name: str, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name}: {what} is not supported yet; this release has dense decoding alone"
    )


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    *,
    use_legacy: bool = False,
    return_log2_lse: bool | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token-level sparse prefill. Raises NotImplementedError."""
    raise _missing("flash_mla_sparse_fwd", "token-level sparse attention")


def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
    """Dense prefill over ragged batches. Raises NotImplementedError."""
    raise _missing("flash_attn_varlen_func", "dense prefill")


def flash_attn_varlen_qkvpacked_func(*args: Any, **kwargs: Any) -> Any:
    """Dense prefill with q, k and v in one tensor. Raises NotImplementedError."""
    raise _missing("flash_attn_varlen_qkvpacked_func", "dense prefill")


def flash_attn_varlen_kvpacked_func(*args: Any, **kwargs: Any) -> Any:
    """Dense prefill with k and v in one tensor. Raises NotImplementedError."""
    raise _missing("flash_attn_varlen_kvpacked_func", "dense prefill")


def fused_norm_rope_attn_rope_cast(*args: Any, **kwargs: Any) -> Any:
    """Attention fused with its neighbours. Raises NotImplementedError."""
    raise _missing(
        "fused_norm_rope_attn_rope_cast", "attention fused with norm, RoPE and the cast to fp8"
    )


# The published name is a module of two functions.
fused_norm_rope_attn_rope_cast.prefill = fused_norm_rope_attn_rope_cast
fused_norm_rope_attn_rope_cast.decode = fused_norm_rope_attn_rope_cast


def has_legacy() -> bool:
    """Whether `use_legacy=True` would choose an older implementation: there is none here."""
    return False
