"""Measures what flash_mla.integrations.transformers is worth: the model's own attention beside ours, in one run.

    PYTHONPATH=python python3 bench/transformers.py [--out FILE] [--build FOLDER] [--rows PATTERN] [--smoke]

Writes bench/results/transformers-<date>-<gpu>.json, after every row. Weights and latents are random. bench/README.md tells the
method. `--smoke` runs every row with tiny sizes, on the CPU where there is no GPU, to see that it works.
"""

import argparse
import datetime
import functools
import gc
import re
import sys
import traceback
from pathlib import Path

BENCH = Path(__file__).resolve().parent
# This file is called like what it imports: its own folder must not be searched.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != BENCH]
sys.path[:0] = [str(BENCH.parent / "tools"), str(BENCH.parent / "python")]

import ledger  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import flash_mla  # noqa: E402
import flash_mla.integrations.transformers as hf  # noqa: E402
from flash_mla.cli import measure, random_models  # noqa: E402
from flash_mla.integrations.transformers.static import StaticLatentLayer  # noqa: E402

OWN = ("sdpa", "eager")  # the model's own attention, of which the faster one counts
V3_LAYER, V3_DENSE, LITE = "v3-layer", "v3-dense", "v2-lite"
V3_DENSE_COMPILED = "v3-dense-compiled"
STATIC_ROOM = 256  # tokens that a static cache could take beyond the context
STEPS = 8  # of a layer in a graph, one after the other, as a model's layers are
WARM_UP = 8  # tokens; a compiled step runs once, is captured once, and is replayed from then on
SWEEP = (128, 1024, 4096, 8192, 16384, 32768)


class Sizes:
    """What is measured: the published geometries, or tiny ones."""

    def __init__(self, smoke):
        self.smoke = smoke
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16
        tiny = {
            "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128,
            "intermediate_size": 64, "moe_intermediate_size": 32,
        }  # fmt: skip
        self.changes = tiny if smoke else {}
        self.context = 100 if smoke else 8192
        self.sweep = (10, 100, 200) if smoke else SWEEP
        self.lite_layers = 2 if smoke else 27
        self.tokens = 8 if smoke else 40
        self.ms = 5.0 if smoke else 100.0


def clear():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated(peak=False):
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


# One attention layer


class Layer:
    """A DeepSeek-V3 attention layer with a cache of `context` random latents.

    fresh() and compiled() make functions that run some steps, of one token of each row, and return the last output.
    """

    def __init__(self, sizes, b, attention):
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

        self.config = random_models.config_of("v3", **sizes.changes)
        self.config._attn_implementation = attention
        self.b, self.context = b, sizes.context
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(sizes.dtype)
        with torch.device(sizes.device), torch.no_grad():
            self.module = modeling.DeepseekV3Attention(self.config, 0).eval()
            for parameter in self.module.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
            self.hidden = torch.randn(b, 1, self.config.hidden_size)
            self.latents = [torch.randn(b, 1, self.context, width) for width in (512, 64)]
        torch.set_default_dtype(default)
        self.static_config = random_models.config_of("v3", 1, **sizes.changes)
        rotary = modeling.DeepseekV3RotaryEmbedding(self.config).to(sizes.device)
        positions = torch.full((1, 1), self.context, device=sizes.device)
        self.positions = rotary(self.hidden, positions)

    def fresh(self):
        """Steps that go on with their own cache."""
        cache = transformers.DynamicCache()
        cache.update(*self.latents, 0)

        def run(steps=1):
            for _ in range(steps):
                out, _ = self.module(self.hidden, self.positions, None, cache)
            return out

        return run

    def compiled(self, ours):
        """Compiled steps over a static cache, as generate() makes them on a GPU. The length is set back before them."""
        longest = self.context + STATIC_ROOM
        cache = transformers.StaticCache(config=self.static_config, max_cache_len=longest)
        if ours:
            state, projection = self.module._flash_mla, self.module.kv_b_proj
            state.ready = state.weights.get(projection, self.hidden.dtype, self.hidden.device)
            cache.layers[0] = StaticLatentLayer(longest, hf.MAX_S_Q)
        cached = cache.layers[0]
        cached.update(*self.latents)
        if ours:
            cached.absorbs = cached.goes_on = True
        mask = torch.arange(longest, device=self.hidden.device) <= self.context
        mask = mask.expand(self.b, 1, 1, -1).contiguous()
        torch._dynamo.reset()
        module = torch.compile(self.module, fullgraph=True, dynamic=False)

        def run(steps=1):
            cached.cumulative_length.fill_(self.context)
            for _ in range(steps):
                out, _ = module(self.hidden, self.positions, mask, cache)
            return out

        run()  # compiles
        return run


def time_layer(fresh, sizes):
    """{us, us_spread: of a step in a CUDA graph of STEPS; us_alone: of a step in a graph of its own; us_eager: of an eager
    step; temporary_bytes} of a layer's steps, which fresh() makes."""
    timed = {}
    if sizes.device == "cuda":
        together = measure.graph_time(functools.partial(fresh(), STEPS), sizes.ms)
        timed["us"], timed["us_spread"] = (us / STEPS for us in together)
        clear()
        timed["us_alone"], _ = measure.graph_time(fresh(), sizes.ms)
        clear()
        timed["us_eager"] = eager_time(fresh())
    else:
        timed["us"], timed["us_spread"] = measure.host_clock_time(fresh(), sizes.ms)
        timed["us_eager"] = timed["us"]
    clear()
    run = fresh()
    run(2)  # the first step turns the cache into pages
    clear()
    before = allocated()
    run()
    timed["temporary_bytes"] = allocated(peak=True) - before
    clear()
    return timed


def eager_time(run, steps=10, batches=5):
    """Microseconds of a step among others, with all that the host does for it."""
    import statistics
    import time

    times = []
    for _ in range(batches + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(steps)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / steps * 1e6)
    return statistics.median(times[1:])


@torch.no_grad()
def measure_layer(sizes, b):
    row = {"name": f"{V3_LAYER}-b{b}", "b": b, "context": sizes.context, "own": {}}
    outputs = {}
    for attention in OWN:
        layer = Layer(sizes, b, attention)
        try:
            row["own"][attention] = time_layer(layer.fresh, sizes)
            outputs[attention] = layer.fresh()()
        except torch.OutOfMemoryError as error:
            row["own"][attention] = {"failure": str(error).splitlines()[0]}
        del layer
        clear()
    layer = Layer(sizes, b, OWN[0])
    hf.enable(layer.module)
    row["ours"] = time_layer(layer.fresh, sizes)
    got = layer.fresh()()
    row["error"] = measure.relative_error(got, outputs[OWN[0]].float())
    calls = hf.info(layer.module).calls
    if not calls["absorbed"] or calls["fallback"]:
        raise RuntimeError(f"not absorbed: {hf.info(layer.module)}")
    own = {name: timed for name, timed in row["own"].items() if "us" in timed}
    row["best_own"] = min(own, key=lambda name: own[name]["us"])
    best = own[row["best_own"]]
    row["ratio"] = best["us"] / row["ours"]["us"]
    row["ratio_eager"] = best["us_eager"] / row["ours"]["us_eager"]
    return row


@torch.no_grad()
def measure_compiled_layer(sizes, b):
    """The same layer compiled over a static cache, the model's own attention and ours."""
    row = {"name": f"{V3_LAYER}-compiled-b{b}", "b": b, "context": sizes.context, "own": {}}
    outputs = {}
    for who in ("own", "ours"):
        layer = Layer(sizes, b, OWN[0])
        if who == "ours":
            hf.enable(layer.module)
        run = layer.compiled(who == "ours")
        outputs[who] = run().float()
        timed = time_layer(lambda run=run: run, sizes)
        if who == "ours":
            row["ours"] = timed
        else:
            row["own"] = {OWN[0]: timed}
        del layer, run
        clear()
    row["error"] = measure.relative_error(outputs["ours"], outputs["own"])
    row["best_own"] = OWN[0]
    row["ratio"] = row["own"][OWN[0]]["us"] / row["ours"]["us"]
    row["ratio_eager"] = row["own"][OWN[0]]["us_eager"] / row["ours"]["us_eager"]
    return row


# Whole models


def generate(model, sizes, b, context, tokens):
    """Decodes with generate() from a cache that holds `context` random latents: {ms_per_step, tokens_per_second,
    peak_bytes (beyond the weights), cache_bytes, cache_tokens}."""
    clear()
    before = allocated()
    cache = random_models.filled_cache(model, b, context)
    clock = decode(model, sizes, cache, b, context, tokens)
    row = measured(cache, b, clock, before)
    del cache
    clear()
    return row


def generate_compiled(model, sizes, b, context, tokens):
    """The same from a static cache, over which generate() compiles its steps where Transformers does so: on a GPU.
    `graphs` were compiled before what is timed, `late_graphs` meanwhile, of which there should be none."""
    torch._dynamo.reset()
    clear()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    before = allocated()
    cache = random_models.filled_static_cache(model, b, context, STATIC_ROOM)
    decode(model, sizes, cache, b, context, WARM_UP)
    compiled = graphs["unique_graphs"]
    # On with the same cache, for whose addresses CUDA graphs were captured.
    random_models.rewind(cache, context)
    clock = decode(model, sizes, cache, b, context, tokens)
    late = graphs["unique_graphs"] - compiled
    row = measured(cache, b, clock, before) | {"graphs": compiled, "late_graphs": late}
    del cache
    torch._dynamo.reset()
    clear()
    return row


def decode(model, sizes, cache, b, context, tokens):
    """Calls generate() with a cache of `context` tokens. Returns the clock of its steps."""
    ids = torch.ones((b, context + 1), dtype=torch.long, device=sizes.device)
    clock = random_models.StepClock(sizes.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        logits_processor=[clock],
        **{random_models.cache_argument(): cache},
    )
    clock.stop()
    return clock


def measured(cache, b, clock, before):
    """What a run of generate() says."""
    return {
        "ms_per_step": clock.ms_per_step,
        "tokens_per_second": b * 1e3 / clock.ms_per_step,
        "peak_bytes": allocated(peak=True) - before,
        "cache_bytes": random_models.cache_bytes(cache),
        "cache_tokens": b * int(cache.get_seq_length()),
    }


def measure_model(model, sizes, name, b, context, tokens=None, run=generate):
    """A row of a whole model: `run` of its own attention and of ours, each after a short run to warm up."""
    row = {"name": name, "b": b, "context": context, "layers": model.config.num_hidden_layers}
    tokens = tokens or sizes.tokens
    hf.disable(model)
    generate(model, sizes, b, min(context, 64), 4)
    try:
        row["own"] = run(model, sizes, b, context, tokens)
    except torch.OutOfMemoryError as error:
        row["own"] = {"failure": str(error).splitlines()[0]}
        clear()
    hf.enable(model)
    generate(model, sizes, b, min(context, 64), 4)
    hf.enable(model)
    row["ours"] = run(model, sizes, b, context, tokens)
    calls = hf.info(model).calls
    if not calls["absorbed"] or calls["fallback"]:
        raise RuntimeError(f"not absorbed: {hf.info(model)}")
    hf.disable(model)
    if "tokens_per_second" in row["own"]:
        row["ratio"] = row["ours"]["tokens_per_second"] / row["own"]["tokens_per_second"]
    return row


def cache_row(row, model):
    """Bytes per token and layer of the cache that a row measured, and of an MHA cache of the same model."""
    config, measured = model.config, row["ours"]
    heads, nope, rope = (
        config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    )  # fmt: skip
    layers, itemsize = config.num_hidden_layers, 2
    mha = layers * heads * (nope + rope + config.v_head_dim) * itemsize
    bytes_per_token = measured["cache_bytes"] / measured["cache_tokens"]
    return {
        "name": f"cache-{row['name']}",
        "layers": layers,
        "heads": heads,
        "bytes_per_token": bytes_per_token,
        "bytes_per_token_formula": layers * (config.kv_lora_rank + rope) * itemsize,
        "mha_bytes_per_token": mha,
        "mha_formula": "layers * heads * (d_nope + d_rope + d_v) * 2",
        "reduction": 1 - bytes_per_token / mha,
    }


def rows(sizes, wanted):
    """The rows, one after the other, as functions of nothing."""

    def all_rows():
        for b in (1, 16):
            yield f"{V3_LAYER}-b{b}", lambda b=b: [measure_layer(sizes, b)]
        yield V3_DENSE, lambda: v3_dense(sizes)
        yield LITE, lambda: v2_lite(sizes)
        # Last, as compiling takes long.
        for b in (1, 16):
            yield f"{V3_LAYER}-compiled-b{b}", lambda b=b: [measure_compiled_layer(sizes, b)]
        yield V3_DENSE_COMPILED, lambda: [v3_dense_compiled(sizes)]

    for name, measure_row in all_rows():
        if re.search(wanted, name):
            yield name, measure_row


def v3_dense_model(sizes):
    config = random_models.config_of("v3", 3, **sizes.changes)
    return random_models.build(config, sizes.device, sizes.dtype, OWN[0])


def v3_dense(sizes):
    model = v3_dense_model(sizes)
    row = measure_model(model, sizes, f"{V3_DENSE}-b16-{sizes.context}", 16, sizes.context)
    yield row
    yield cache_row(row, model)


def v3_dense_compiled(sizes):
    name = f"{V3_DENSE_COMPILED}-b16-{sizes.context}"
    model = v3_dense_model(sizes)
    return measure_model(model, sizes, name, 16, sizes.context, run=generate_compiled)


def v2_lite(sizes):
    config = random_models.config_of("deepseek-v2-lite", sizes.lite_layers, **sizes.changes)
    model = random_models.build(config, sizes.device, sizes.dtype, OWN[0])
    yield measure_model(model, sizes, f"{LITE}-b8-{sizes.sweep[0]}", 8, sizes.sweep[0])
    tokens = max(sizes.tokens // 2, 6)
    for context in sizes.sweep[::-1]:  # the longest first: it is the one that is judged
        row = measure_model(model, sizes, f"{LITE}-b16-{context}", 16, context, tokens)
        yield row
        if context == max(sizes.sweep):
            yield cache_row(row, model)


def header(args, sizes):
    """What every result file says first."""
    if sizes.device == "cpu":
        facts = measure.machine("cpu")
        facts |= {"toolkit": "", "digest": ""}
    else:
        name, driver, _ = ledger.gpu()
        builds = (
            [args.build] if args.build else [BENCH.parent / "build" / n for n in ("gpu", "make")]
        )
        stamp = next(filter(None, map(ledger.read_stamp, builds)), None)
        stamp = stamp or {"toolkit": "", "digest": ledger.digest(ledger.toolkit_version())}
        cuda = ".".join(stamp["toolkit"].split(".")[:2]) or torch.version.cuda
        facts = {"gpu": name, "driver": driver, "cuda": cuda, "torch": torch.__version__, **stamp}
    facts |= {"transformers": transformers.__version__, "flash_mla": flash_mla.__version__}
    facts |= {"date": datetime.date.today().isoformat(), "smoke": sizes.smoke, "rows": []}
    return facts


def line(row):
    """One line of progress."""
    if "failure" in row:
        return f"{row['name']:28} FAILED: {row['failure']}"
    if "reduction" in row:
        return f"{row['name']:28} {row['bytes_per_token']:.0f} bytes a token, MHA {row['mha_bytes_per_token']}"
    head = f"{row['name']:28} context {row['context']:6}"
    if "us" in row["ours"]:
        own = "  ".join(
            f"{name} {timed.get('us', float('nan')):.0f}" for name, timed in row["own"].items()
        )
        temporary = row["ours"]["temporary_bytes"] / 1e9
        return (
            f"{head}  ours {row['ours']['us']:.0f} us (eager {row['ours']['us_eager']:.0f}), own {own} us, ratio {row['ratio']:.1f} "
            f"(eager {row['ratio_eager']:.1f}), temporary {temporary:.2f} GB, error {row['error']:.1e}"
        )
    own = row["own"].get("tokens_per_second", float("nan"))
    return f"{head}  ours {row['ours']['tokens_per_second']:.0f} tokens/s, own {own:.0f}, ratio {row.get('ratio', float('nan')):.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="default bench/results/transformers-<date>-<gpu>.json"
    )
    parser.add_argument("--build", type=Path, help="the CMake build folder, for its stamp")
    parser.add_argument("--rows", default="", help="only rows whose name matches this pattern")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    args = parser.parse_args()
    sizes = Sizes(args.smoke)
    if sizes.device == "cpu" and not args.smoke:
        sys.exit("bench/transformers.py: a Hopper GPU is needed; on the CPU: --smoke")
    transformers.logging.set_verbosity_error()
    result = header(args, sizes)
    slug = re.sub(r"[^a-z0-9]+", "-", result["gpu"].lower()).strip("-")
    out = args.out or ledger.RESULTS / f"transformers-{result['date']}-{slug}.json"
    failed = []
    for name, measure_row in rows(sizes, args.rows):
        try:
            for row in measure_row():
                result["rows"].append(row)
                print(line(row), flush=True)
                ledger.write(out, result)
        except Exception as error:  # a row that fails must not cost the others
            traceback.print_exc()
            result["rows"].append({"name": name, "failure": f"{type(error).__name__}: {error}"})
            ledger.write(out, result)
            failed.append(name)
        clear()
    print(f"{len(result['rows'])} rows in {out}")
    if failed:
        sys.exit("bench/transformers.py: FAILED: " + ", ".join(failed))


if __name__ == "__main__":
    main()
