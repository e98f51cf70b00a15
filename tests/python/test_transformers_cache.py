"""The cache layer over pages: against plain lists, in random sequences of everything that a cache is asked for."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from tiny_models import build, forward, padded, tokens
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import flash_mla.integrations.transformers as hf
from flash_mla.integrations.transformers.cache import LatentLayer, adopt, release
from flash_mla.integrations.transformers.rows import LatentRows

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 2


@pytest.fixture(autouse=True)
def poisoned_pages(monkeypatch) -> None:
    """Pages start as NaN, so that reading what was not written shows."""
    make = LatentLayer._new_pages

    def poisoned(self, num_pages):
        return make(self, num_pages).fill_(float("nan"))

    monkeypatch.setattr(LatentLayer, "_new_pages", poisoned)


class Oracle:
    """Every layer's tokens as padded tensors, and which of them are real."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.draw = random.Random(seed)
        self.mask = torch.ones((3, 0), dtype=torch.long)
        self.latents = [torch.zeros((3, 0, 576), dtype=torch.bfloat16) for _ in range(LAYERS)]

    def new(self, s_q: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The mask of new tokens, with some padding, and their latents in each layer."""
        b = self.mask.shape[0]
        new = torch.ones((b, s_q), dtype=torch.long)
        if self.draw.random() < 0.5:
            new[torch.rand((b, s_q), generator=self.generator) < 0.3] = 0
        shape = (b, s_q, 576)
        return new, [torch.randn(shape, generator=self.generator).bfloat16() for _ in range(LAYERS)]

    def add(self, new: torch.Tensor, latents: list[torch.Tensor]) -> None:
        self.mask = torch.cat([self.mask, new], 1)
        self.latents = [torch.cat(pair, 1) for pair in zip(self.latents, latents, strict=True)]

    def hide(self) -> None:
        """Masks some tokens out."""
        hidden = torch.rand(self.mask.shape, generator=self.generator) < 0.1
        self.mask = torch.where(hidden, 0, self.mask)

    def select(self, rows: list[int]) -> None:
        self.mask = self.mask[rows]
        self.latents = [latents[rows] for latents in self.latents]

    def crop(self, count: int) -> None:
        kept = max(self.mask.shape[1] - count, 0)
        self.mask = self.mask[:, :kept]
        self.latents = [latents[:, :kept] for latents in self.latents]

    def check(self, cache: DynamicCache) -> None:
        rows = cache.layers[0].rows
        assert cache.get_seq_length() == self.mask.shape[1]
        lengths = self.mask.sum(1).tolist()
        assert rows.tokens == lengths
        assert [len(pages) for pages in rows.pages] == [-(-length // 64) for length in lengths]
        owned = {page for pages in rows.pages for page in pages}
        for layer, latents in zip(cache.layers, self.latents, strict=True):
            wanted = latents.masked_fill(self.mask.eq(0)[..., None], 0)
            assert torch.equal(layer.keys.cpu()[:, 0], wanted[..., :512])
            assert torch.equal(layer.values.cpu()[:, 0], wanted[..., 512:])
            flat = layer.pages.view(-1, 64, 576).cpu()
            for row, pages in enumerate(rows.pages):  # in pages: real tokens only, in their order
                held = flat[pages].flatten(0, 1)[: lengths[row]]
                assert torch.equal(held, latents[row][self.mask[row].bool()])
        if rows._undo is None:
            assert rows.used_pages == len(owned)


def layers_of(oracle: Oracle, s_q: int) -> DynamicCache:
    """A cache whose first tokens came from elsewhere."""
    new, latents = oracle.new(s_q)
    oracle.add(new, latents)
    cache = DynamicCache()
    for index, latent in enumerate(latents):
        latent = latent[:, None].to(oracle.device)
        cache.update(latent[..., :512], latent[..., 512:], index)
    mask = None if bool(new.all()) else oracle.mask.to(oracle.device)
    assert adopt(cache, range(LAYERS), mask) == {}
    return cache


def layers_without_padding(device: str, length: int) -> DynamicCache:
    cache = DynamicCache()
    for index in range(LAYERS):
        latent = torch.randn((3, 1, length, 576), device=device).bfloat16()
        cache.update(latent[..., :512], latent[..., 512:], index)
    assert adopt(cache, range(LAYERS)) == {}
    return cache


def step(cache: DynamicCache, oracle: Oracle, s_q: int, absorbed: bool) -> None:
    new, latents = oracle.new(s_q)
    if oracle.draw.random() < 0.2:
        oracle.hide()
    oracle.add(new, latents)
    mask = None if bool(oracle.mask.all()) else oracle.mask.to(oracle.device)
    cache.layers[0].rows.begin(s_q, mask, absorbed)
    for index, latent in enumerate(latents):
        given = latent[:, None].to(oracle.device)
        keys, values = cache.update(given[..., :512], given[..., 512:], index)
        if absorbed:
            assert torch.equal(keys, given[..., :512]) and hasattr(keys, "_flash_mla_layer")
        else:
            wanted = oracle.latents[index].masked_fill(oracle.mask.eq(0)[..., None], 0)
            assert torch.equal(torch.cat((keys, values), -1).cpu()[:, 0], wanted)
    check_step_tensors(cache, oracle)


def check_step_tensors(cache: DynamicCache, oracle: Oracle) -> None:
    """What the kernel gets: table and lengths lead to the row's real tokens."""
    for layer, latents in zip(cache.layers, oracle.latents, strict=True):
        tensors = layer.rows.tensors(layer.device)
        assert tensors.lengths.tolist() == oracle.mask.sum(1).tolist()
        flat = layer.pages.view(-1, 576).cpu()
        for row, length in enumerate(tensors.lengths.tolist()):
            at = torch.arange(length)
            slots = tensors.table[row].cpu().long()[at // 64] * 64 + at % 64
            assert torch.equal(flat[slots], latents[row][oracle.mask[row].bool()])


@pytest.mark.parametrize("seed", range(12))
def test_random_sequences(device: str, seed: int) -> None:
    oracle = Oracle(device, seed)
    draw = oracle.draw
    cache = layers_of(oracle, draw.choice((1, 63, 64, 65, 90)))
    oracle.check(cache)
    for _ in range(40):
        b, length = oracle.mask.shape
        kind = draw.choice(
            ("step", "step", "step", "one", "one", "crop", "reorder", "repeat", "select", "copy")
        )
        if kind == "step":
            step(cache, oracle, draw.choice((2, 5, 64, 70)), draw.random() < 0.5)
        elif kind == "one":
            for _ in range(draw.randint(1, 4)):
                step(cache, oracle, 1, True)
        elif kind == "crop":
            count = draw.choice((0, 0, 1, 3, length // 2, length + 1))
            cache.crop(-count)
            oracle.crop(count)
            if count > length:
                cache, oracle = layers_of(again := Oracle(device, seed + 100), 40), again
        elif kind == "reorder":
            rows = [draw.randrange(b) for _ in range(b)]
            cache.reorder_cache(torch.tensor(rows, device=device))
            oracle.select(rows)
        elif kind == "repeat" and b <= 3:
            cache.batch_repeat_interleave(2)
            oracle.select([row for row in range(b) for _ in range(2)])
        elif kind == "select" and b > 1:
            kept = sorted(draw.sample(range(b), draw.randint(1, b)))
            as_mask = torch.tensor([row in kept for row in range(b)], device=device)
            cache.batch_select_indices(
                as_mask if draw.random() < 0.5 else torch.tensor(kept, device=device)
            )
            oracle.select(kept)
        elif kind == "copy":
            other, kept = copy.deepcopy(cache), copy.deepcopy(oracle)
            step(cache, oracle, 3, False)  # what is done to one shows in the other no more
            kept.check(other)
            if draw.random() < 0.5:
                cache, oracle = other, kept
        oracle.check(cache)


def test_repeated_rows_share_pages(device: str) -> None:
    """Copied on write: a page is copied when one of its rows writes, no earlier, and no other page."""
    cache = layers_without_padding(device, 150)
    rows = cache.layers[0].rows
    assert rows.used_pages == 9
    cache.reorder_cache(torch.tensor([1, 1, 1], device=device))
    assert rows.used_pages == 3
    new = torch.ones((3, 1, 1, 576), dtype=torch.bfloat16, device=device)
    for index in range(LAYERS):
        cache.update(new[..., :512], new[..., 512:], index)
    assert (
        len({page for pages in rows.pages for page in pages}) == 5
    )  # two for all, a last one each
    assert [pages[:2] for pages in rows.pages] == [rows.pages[0][:2]] * 3
    cache.crop(-1)
    assert rows.used_pages == 5


def test_crop_gives_pages_back(device: str) -> None:
    oracle = Oracle(device, 0)
    cache = layers_of(oracle, 200)
    for count in (0, 10, 100):
        cache.crop(-count)
        oracle.crop(count)
        oracle.check(cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].rows.used_pages == 0


def test_crop_takes_what_transformers_takes(device: str) -> None:
    """A tensor, as assisted decoding gives; a length, as before Transformers 5.18."""
    oracle = Oracle(device, 0)
    cache = layers_of(oracle, 100)
    cache.crop(-torch.tensor(30, device=device))
    assert cache.get_seq_length() == 70
    for layer in cache.layers:
        layer.crop(40)
    assert cache.get_seq_length() == 40
    for layer in cache.layers:
        layer.crop(60)
    assert cache.get_seq_length() == 40


def test_no_synchronisation_and_no_upload_for_a_token_within_pages() -> None:
    """Where every row's last page has room, the step's tensors are made of the last step's."""
    cache = layers_without_padding("cpu", 61)
    rows, made = cache.layers[0].rows, []
    new = [torch.zeros((3, 1, 1, width), dtype=torch.bfloat16) for width in (512, 64)]
    for _ in range(5):
        rows.begin(1)
        made.append(rows._advances)
        for layer in cache.layers:
            layer.update(*new)
        cache.crop(0)  # as generate() does after every step
        tensors = rows.tensors(torch.device("cpu"))
        assert tensors.lengths.tolist() == rows.tokens
        assert tensors.slots.tolist() == [
            pages[(count - 1) // 64] * 64 + (count - 1) % 64
            for pages, count in zip(rows.pages, rows.tokens, strict=True)
        ]
    # Not after the tokens that were adopted, and not where a page is added.
    assert made == [False, True, True, False, True]


def test_out_of_pages_changes_nothing() -> None:
    """The error names pages; every row is as it was, and decodes on once there is room."""
    model = build("deepseek_v3")
    ids, mask = padded(tokens(3, 200), (0, 5, 100))
    cache = DynamicCache()
    plain = DynamicCache()
    hf.enable(model, max_pages=7)  # 200, 195 and 100 tokens: 4 + 4 + 2
    with torch.no_grad():
        forward(model, ids[:, :120], cache, mask[:, :120])
        forward(model, ids[:, 120:121], cache, mask[:, :121])
        before = [(layer.keys, layer.values) for layer in cache.layers]
        pages, used = copy.deepcopy(cache.layers[0].rows.pages), cache.layers[0].rows.used_pages
        with pytest.raises(
            MemoryError, match="flash_mla: out of pages: a row needs 2 more, 0 of 7 are free"
        ):
            forward(model, ids[:, 121:], cache, mask)
        rows = cache.layers[0].rows
        assert cache.get_seq_length() == 121 and (rows.pages, rows.used_pages) == (pages, used)
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        rows.max_pages = 20
        got = forward(model, ids[:, 121:], cache, mask).logits
        hf.disable(model)
        forward(model, ids[:, :121], plain, mask[:, :121])
        wanted = forward(model, ids[:, 121:], plain, mask).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_out_of_pages_while_a_cache_is_adopted() -> None:
    model = build("deepseek_v3")
    ids = tokens(2, 100)
    hf.enable(model, max_pages=3)
    cache = DynamicCache()
    with torch.no_grad():
        forward(model, ids[:, :90], cache)
        before = [layer.keys for layer in cache.layers]
        with pytest.raises(
            MemoryError, match="flash_mla: out of pages: a row needs 2 more, 1 of 3 are free"
        ):
            forward(model, ids[:, 90:91], cache)
    assert all(type(layer) is DynamicLayer for layer in cache.layers)
    assert all(
        torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True)
    )
    # Once it may use more, it goes on.
    hf.enable(model, max_pages=4)
    with torch.no_grad():
        forward(model, ids[:, 90:91], cache)
    assert hf.info(model).calls["absorbed"] == 2


def test_out_of_memory_is_told(monkeypatch) -> None:
    oracle = Oracle("cpu", 0)
    cache = layers_of(oracle, 60)
    rows = cache.layers[0].rows

    def none_left(*shape, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty", none_left)
    with pytest.raises(
        MemoryError, match=r"no memory for \d+ pages of a layer \([\d,]+ bytes\) on cpu"
    ):
        rows.begin(500, oracle.mask.new_ones((3, 560)))
    monkeypatch.undo()
    oracle.check(cache)


def test_a_step_that_fails_midway_is_taken_back() -> None:
    model = build("deepseek_v3")
    ids, mask = padded(tokens(2, 70), (0, 9))
    hf.enable(model)
    cache = DynamicCache()
    with torch.no_grad():
        forward(model, ids[:, :60], cache, mask[:, :60])
        forward(model, ids[:, 60:61], cache, mask[:, :61])
        cache.reorder_cache(torch.tensor([1, 1]))
        mask = mask[[1, 1]]
        wanted = forward(model, ids[:, 61:], copy.deepcopy(cache), mask).logits

        def fail(*args):
            raise RuntimeError("broken")

        handle = model.model.layers[1].self_attn.register_forward_pre_hook(fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broken"):
                forward(model, ids[:, 61:], cache, mask)
            assert cache.get_seq_length() == 61
        handle.remove()
        assert torch.equal(forward(model, ids[:, 61:], cache, mask).logits, wanted)


def test_padding_does_not_come_back() -> None:
    """A mask, or none, that asks for tokens which were padding: there is nothing to fall back on."""
    model = build("deepseek_v3")
    ids, mask = padded(tokens(2, 20), (0, 9))
    hf.enable(model)
    cache = DynamicCache()
    with torch.no_grad():
        forward(model, ids[:, :18], cache, mask[:, :18])
        forward(model, ids[:, 18:19], cache, mask[:, :19])
        used = cache.layers[0].rows.used_pages
        with pytest.raises(ValueError, match="asks for tokens that it called padding before"):
            forward(model, ids[:, 19:], cache, torch.ones_like(mask))
        with pytest.raises(ValueError, match="the cache holds no padding.*pass an attention_mask"):
            forward(model, ids[:, 19:], cache)
        with pytest.raises(ValueError, match="3 rows of tokens, the cache holds 2"):
            forward(model, tokens(3, 1), cache, torch.ones(3, 20, dtype=torch.long))
        assert cache.get_seq_length() == 19 and cache.layers[0].rows.used_pages == used
        forward(model, ids[:, 19:], cache, mask)
    assert hf.info(model).calls["absorbed"] == 4


def test_layers_are_told_the_same() -> None:
    oracle = Oracle("cpu", 0)
    cache = layers_of(oracle, 20)
    cache.layers[0].crop(-1)
    with pytest.raises(RuntimeError, match="told to reorder_cache where others were told to crop"):
        cache.layers[1].reorder_cache(torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="1 cache layers were not told of crop"):
        cache.layers[0].rows.begin(1)
    cache.layers[1].crop(-1)
    oracle.crop(1)
    oracle.check(cache)


def test_wrong_latents() -> None:
    oracle = Oracle("cpu", 0)
    cache = layers_of(oracle, 20)
    good = [torch.zeros((3, 1, 1, width), dtype=torch.bfloat16) for width in (512, 64)]
    with pytest.raises(ValueError, match="the cache holds latents of 3 rows, 512 and 64 wide; got"):
        cache.update(good[0][:2], good[1][:2], 0)
    with pytest.raises(
        TypeError, match="latents are torch.float32 and torch.bfloat16, the cache holds"
    ):
        cache.update(good[0].float(), good[1], 0)
    cache.layers[0].rows.begin(2)
    with pytest.raises(ValueError, match="1 new tokens, the step was planned for 2"):
        cache.update(*good, 0)
    step(cache, oracle, 1, False)  # takes back the one that failed
    oracle.check(cache)


def test_what_cannot_be_adopted() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 4, 3, 192), torch.zeros(1, 4, 3, 128), 0)
    cache.update(torch.zeros(1, 1, 3, 512), torch.zeros(1, 1, 3, 64), 1)
    cache.layers[1].values = cache.layers[1].values.bfloat16()
    cache.update(torch.zeros(1, 1, 3, 512), torch.zeros(1, 1, 3, 64), 2)
    cache.update(torch.zeros(1, 1, 2, 512), torch.zeros(1, 1, 2, 64), 3)
    reasons = adopt(cache, range(6))
    assert [index for index in range(6) if index not in reasons] == [2]
    assert reasons[0].endswith("wanted latents 512 and 64 wide")
    assert reasons[1] == "its latents are torch.float32 and torch.bfloat16"
    assert reasons[3] == "its cache holds 2 tokens of 1 rows, other layers 3 of 1"
    assert reasons[4] == "its cache is a NoneType, wanted a DynamicLayer"


def test_a_cache_in_pages_serves_a_model_that_is_not_enabled(device: str) -> None:
    """After disable, or given back: the model's own attention sees the same latents."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build("deepseek_v3", dtype, device)
    ids, mask = padded(tokens(3, 90, device), (0, 5, 70))
    hf.enable(model)
    cache = DynamicCache()
    with torch.no_grad():
        for start, stop in ((0, 80), (80, 81), (81, 83)):
            forward(model, ids[:, start:stop], cache, mask[:, :stop])
        hf.disable(model)
        plain = copy.deepcopy(cache)
        release(plain)
        assert all(type(layer) is DynamicLayer for layer in plain.layers)
        for start, stop in ((83, 84), (84, 90)):
            got = forward(model, ids[:, start:stop], cache, mask[:, :stop]).logits
            wanted = forward(model, ids[:, start:stop], plain, mask[:, :stop]).logits
            assert torch.equal(got, wanted)
    keys = [keys for keys, *_ in cache]
    assert len(keys) == 2 and keys[0].shape == (3, 1, 90, 512)


def test_rows_without_tokens() -> None:
    rows = LatentRows(2)
    rows.begin(3, torch.tensor([[0, 0, 0], [0, 1, 1]]))
    assert rows.tokens == [0, 2] and rows.pages[0] == []
    rows.started()
    rows.begin(1, torch.tensor([[0, 0, 0, 1], [0, 1, 1, 0]]))
    assert rows.tokens == [1, 2]


def test_usage_is_told(device: str) -> None:
    oracle = Oracle(device, 0)
    cache = layers_of(oracle, 70)
    layer = cache.layers[0]
    assert layer.nbytes == layer.rows.used_pages * 64 * 576 * 2
    assert "3 rows, 70 tokens" in repr(cache)
