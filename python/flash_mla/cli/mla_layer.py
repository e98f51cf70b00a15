"""One Multi-head Latent Attention layer, in the naive and in the absorbed form.

DeepSeek-V2 (arXiv:2405.04434, section 2.1 and appendix C) without q_lora, as in DeepSeek-V2-Lite:

    c_t = RMSNorm(W_DKV h_t) (the latent) and k_t^R = RoPE(W_KR h_t) are cached
    q_t,i = [W_UQ,i h_t ; RoPE(W_QR,i h_t)]
    k_t,i = [W_UK,i c_t ; k_t^R]                   v_t,i = W_UV,i c_t

Naive: attention over k and v of every head. Absorbed: <W_UQ h, W_UK c> = <W_UK^T W_UQ h, c>, so the
queries move into the latent space, attention runs on the cache as it is, and W_UV follows.
RoPE is the plain one of theta 10000; weights are random.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Geometry:
    """DeepSeek-V2-Lite's by default."""

    hidden: int = 2048
    heads: int = 16
    kv_lora_rank: int = 512
    d_nope: int = 128
    d_rope: int = 64
    d_v: int = 128

    @property
    def softmax_scale(self) -> float:
        return (self.d_nope + self.d_rope) ** -0.5


class MlaLayer:
    """Weights in `dtype` on `device`; the same for the same seed everywhere."""

    def __init__(
        self,
        geometry: Geometry,
        device: str | torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        self.geometry = g = geometry
        generator = torch.Generator("cpu").manual_seed(seed)

        def weight(*shape: int, fan_in: int) -> torch.Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            # Rounded to bf16 first, so that every device and dtype sees the same weights.
            return (values * fan_in**-0.5).bfloat16().to(device, dtype)

        self.w_q = weight(g.hidden, g.heads * (g.d_nope + g.d_rope), fan_in=g.hidden)
        self.w_kv_down = weight(g.hidden, g.kv_lora_rank + g.d_rope, fan_in=g.hidden)
        self.w_uk = weight(g.heads, g.d_nope, g.kv_lora_rank, fan_in=g.kv_lora_rank)
        self.w_uv = weight(g.heads, g.kv_lora_rank, g.d_v, fan_in=g.kv_lora_rank)
        self.w_o = weight(g.heads * g.d_v, g.hidden, fan_in=g.heads * g.d_v)

    def to_float64(self) -> MlaLayer:
        """The same layer in float64 on the CPU."""
        layer = MlaLayer.__new__(MlaLayer)
        layer.geometry = self.geometry
        for name in ("w_q", "w_kv_down", "w_uk", "w_uv", "w_o"):
            setattr(layer, name, getattr(self, name).to("cpu", torch.float64))
        return layer

    def compress(
        self, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is cached of tokens [t, hidden]: latent [t, 512] and RoPE key [t, 64]."""
        g = self.geometry
        down = hidden @ self.w_kv_down
        latent, k_rope = down.split((g.kv_lora_rank, g.d_rope), dim=-1)
        return _rms_norm(latent), _rope(k_rope, positions)

    def query(
        self, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of tokens [t, hidden]: [t, heads, 128] without and [t, heads, 64] with RoPE."""
        g = self.geometry
        q = (hidden @ self.w_q).unflatten(-1, (g.heads, g.d_nope + g.d_rope))
        q_nope, q_rope = q.split((g.d_nope, g.d_rope), dim=-1)
        return q_nope, _rope(q_rope, positions[:, None])

    def absorbed_query(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Queries in the latent space: [t, heads, 576]."""
        q_nope, q_rope = self.query(hidden, positions)
        q_latent = torch.einsum("thd,hdc->thc", q_nope, self.w_uk)
        return torch.cat((q_latent, q_rope), dim=-1)

    def project_out(self, latent_out: torch.Tensor) -> torch.Tensor:
        """Attention results in the latent space [t, heads, 512] to outputs [t, hidden]."""
        values = torch.einsum("thc,hcv->thv", latent_out, self.w_uv)
        return values.flatten(1) @ self.w_o

    def naive(self, hidden: torch.Tensor, round_to: torch.dtype | None = None) -> torch.Tensor:
        """Plain multi-head attention of the last of tokens [t, hidden] over all: [hidden].

        With `round_to`, what a kernel of that type would hold (q, k, v, probabilities, result) is
        rounded to it: the error such a kernel must be allowed.
        """

        def rounded(x: torch.Tensor) -> torch.Tensor:
            return x if round_to is None else x.to(round_to).to(x.dtype)

        g = self.geometry
        positions = torch.arange(hidden.shape[0], device=hidden.device)
        latent, k_rope = self.compress(hidden, positions)
        latent, k_rope = rounded(latent), rounded(k_rope)
        q = rounded(torch.cat(self.query(hidden[-1:], positions[-1:]), dim=-1))[0]
        k_nope = torch.einsum("tc,hdc->thd", latent, self.w_uk)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, g.heads, -1)), dim=-1)
        v = torch.einsum("tc,hcv->thv", latent, self.w_uv)
        scores = torch.einsum("hd,thd->ht", q, rounded(k)) * g.softmax_scale
        p = rounded(torch.softmax(scores, dim=-1))
        out = rounded(torch.einsum("ht,thv->hv", p, rounded(v)))
        return out.flatten() @ self.w_o


def _rms_norm(x: torch.Tensor) -> torch.Tensor:
    wide = _widened(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _rope(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotates pairs (2i, 2i + 1) of the last axis by positions * 10000 ** (-2i / d)."""
    wide = _widened(x)
    d = x.shape[-1]
    exponents = torch.arange(0, d, 2, dtype=torch.float64, device=x.device) / d
    angles = positions[..., None].double() * 10000.0**-exponents
    cos, sin = angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def _widened(x: torch.Tensor) -> torch.Tensor:
    """In fp32 where x is narrower."""
    return x.float() if x.dtype.itemsize < 4 else x
