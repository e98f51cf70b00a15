"""Decodes three requests from one paged latent cache, on a Hopper GPU when there is one, and checks the result."""

import torch

import flash_mla

H_Q = 16  # query heads that share the one latent KV head


def main() -> None:
    supported = any(device["supported"] for device in flash_mla.info()["devices"])
    device = "cuda" if supported and torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    # A cache of 40 pages of 64 tokens; three requests write their prompts into it.
    cache = flash_mla.PagedKVCache(num_pages=40, page_size=64, dtype=torch.bfloat16, device=device)
    prompts = {"a": 1000, "b": 7, "c": 300}
    for name, tokens in prompts.items():
        latent = torch.randn(tokens, 576, dtype=torch.bfloat16, device=device) / 10
        cache.allocate(name)
        cache.append(name, latent[:, :512], latent[:, 512:])

    # One decode step: one new query token for each request, all decoded together.
    names = list(prompts)
    q = torch.randn(len(names), 1, H_Q, 576, dtype=torch.bfloat16, device=device) / 10
    lengths, table = cache.cache_seqlens(names), cache.block_table(names)
    metadata, _ = flash_mla.get_mla_metadata()  # one for all layers of a step
    out, lse = flash_mla.flash_mla_with_kvcache(
        q,
        cache.kv_cache,
        table,
        lengths,
        head_dim_v=512,
        tile_scheduler_metadata=metadata,
        causal=True,
    )

    # The same in float64, request by request.
    worst = 0.0
    for i, name in enumerate(names):
        keys = cache.kv_cache.view(-1, 576)[cache.slot_mapping(name)].double()
        weights = torch.softmax(q[i, 0].double() @ keys.T * 576**-0.5, dim=-1)
        worst = max(worst, (out[i, 0].double() - weights @ keys[:, :512]).abs().max().item())
    print(f"device {device}: out {tuple(out.shape)}, lse {tuple(lse.shape)}")
    print(f"pages in use: {cache.usage.used_pages} of {cache.usage.num_pages}")
    print(f"largest error against float64: {worst:.1e}")
    assert worst < 1e-3


if __name__ == "__main__":
    main()
