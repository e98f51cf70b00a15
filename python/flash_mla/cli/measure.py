"""Measuring core of `flash-mla bench` and `make gpu-bench`: cases, inputs, reference check, timing.

Method on a GPU: one call is captured in a CUDA graph, L2 is overwritten before every replay, CUDA
events stand around the replay alone, and the median counts. On the CPU calls are timed one by one
with the host's clock, caches as the call before left them. Calls that are compared take turns
(time_in_rounds), because the clock of a card at its power limit depends on what ran before.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

import flash_mla

D_QK = 576
D_V = 512
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# The largest error, relative to the reference's largest value, of an output worth timing. Correct
# kernels show 0.003 to 0.005 in bf16; a wrong mask or page shows 0.1 and more.
ERROR_LIMIT = 0.02

# Rounds in which calls that are compared take turns. Even: every second one goes backwards.
ROUNDS = 6

_FLUSH_BYTES = 256 * 2**20
_WARMUP_MS = 40.0
_MIN_REPEATS, _MAX_REPEATS = 10, 1000
_TABLE_GRANULE = 256  # tokens; the table's width is rounded up to it


@dataclasses.dataclass(frozen=True)
class Case:
    """One decode to time. Field names are the keys of a case file."""

    name: str
    b: int
    s_q: int
    h_q: int
    s_kv: int  # tokens of each request; with varlen their mean
    h_kv: int = 1
    varlen: bool = False
    dtype: str = "bf16"
    page_size: int = 64
    regime: str = ""


@dataclasses.dataclass
class Inputs:
    """The tensors of one case, shaped as flash_mla_with_kvcache takes them."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    lengths: list[int]
    softmax_scale: float


# An adapter: given inputs, does the planning and returns a call that gives out [b, s_q, h_q, 512].
Adapter = Callable[[Inputs], Callable[[], torch.Tensor]]

# A prepared call: runs so many times, gives the microseconds of each.
Run = Callable[[int], list[float]]


def load_cases(path: str | Path) -> list[Case]:
    """Reads a case file: a list of objects, or an object with such a list under "cases".

    Keys that are no field of Case (goals, notes) are skipped. Raises ValueError on anything else.
    """
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    entries = document.get("cases") if isinstance(document, dict) else document
    if not isinstance(entries, list):
        raise ValueError(f"{path}: wanted a list of cases, or an object with one under 'cases'")
    fields = {field.name for field in dataclasses.fields(Case)}
    cases = []
    for number, entry in enumerate(entries):
        try:
            case = Case(**{key: value for key, value in entry.items() if key in fields})
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{path}: case {number}: {error}") from None
        if case.dtype not in DTYPES:
            raise ValueError(f"{path}: {case.name}: dtype = {case.dtype}, wanted {list(DTYPES)}")
        sizes = (case.b, case.s_q, case.h_q, case.s_kv, case.h_kv, case.page_size)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"{path}: {case.name}: every size must be a positive integer")
        if case.h_q % case.h_kv:
            raise ValueError(f"{path}: {case.name}: h_q = {case.h_q}, no multiple of h_kv")
        cases.append(case)
    return cases


def case_lengths(case: Case, seed: int = 0) -> list[int]:
    """Tokens of each request: s_kv, or with varlen drawn from a normal distribution round it."""
    if not case.varlen:
        return [case.s_kv] * case.b
    draw = random.Random(seed)
    return [max(int(draw.normalvariate(case.s_kv, case.s_kv / 2)), case.s_q) for _ in range(case.b)]


def make_inputs(case: Case, device: str | torch.device, seed: int = 0) -> Inputs:
    """Random inputs: values randn / 10, pages shuffled over the whole cache."""
    device = torch.device(device)
    dtype = DTYPES[case.dtype]
    lengths = case_lengths(case, seed)
    tokens = math.ceil(max(lengths) / _TABLE_GRANULE) * _TABLE_GRANULE
    max_pages = math.ceil(tokens / case.page_size)
    num_pages = case.b * max_pages
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator).div_(10)

    pages = torch.randperm(num_pages, dtype=torch.int32, device=device, generator=generator)
    return Inputs(
        q=randn(case.b, case.s_q, case.h_q, D_QK),
        kv_cache=randn(num_pages, case.page_size, case.h_kv, D_QK),
        block_table=pages.view(case.b, max_pages),
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=device),
        lengths=lengths,
        softmax_scale=D_QK**-0.5,
    )


def reference_request(inputs: Inputs, i: int) -> torch.Tensor:
    """Causal attention of request i in fp32: [s_q, h_q, 512]."""
    length = inputs.lengths[i]
    q = inputs.q[i].float()
    s_q, h_q, _ = q.shape
    h_kv = inputs.kv_cache.shape[2]
    k = inputs.kv_cache[inputs.block_table[i].long()].flatten(0, 1)[:length].float()
    grouped = q.view(s_q, h_kv, h_q // h_kv, D_QK)
    scores = torch.einsum("sghd,ngd->sghn", grouped, k) * inputs.softmax_scale
    last_key = length - s_q + torch.arange(s_q, device=q.device)
    hidden = torch.arange(length, device=q.device)[None, :] > last_key[:, None]
    scores.masked_fill_(hidden[:, None, None, :], -math.inf)
    out = torch.einsum("sghn,ngd->sghd", torch.softmax(scores, -1), k[..., :D_V])
    return out.reshape(s_q, h_q, D_V)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest wanted value; inf where a result is not finite."""
    error = ((got.float() - want).abs().max() / want.abs().max()).item()
    return error if math.isfinite(error) else math.inf


def ours(
    inputs: Inputs, replan: bool = False, batch_invariant: bool = False
) -> Callable[[], torch.Tensor]:
    """The decode call of this package; with `replan` every call plans anew."""
    metadata, _ = flash_mla.get_mla_metadata()

    def call() -> torch.Tensor:
        if replan:
            metadata.have_initialized = False
        return flash_mla.flash_mla_with_kvcache(
            inputs.q,
            inputs.kv_cache,
            inputs.block_table,
            inputs.cache_seqlens,
            D_V,
            metadata,
            softmax_scale=inputs.softmax_scale,
            causal=True,
            enable_batch_invariant=batch_invariant,
        )[0]

    return call


def graph_run(fn: Callable[[], object]) -> Run:
    """Captures a CUDA call in a graph; the run replays it, and times each replay alone.

    A buffer of at least twice the size of L2 is written before every replay.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush_bytes = max(_FLUSH_BYTES, 2 * properties.L2_cache_size)

    def replay(repeats: int) -> list[float]:
        # Made here, so that the runs of several graphs get the same memory from PyTorch's cache.
        flush = torch.empty(flush_bytes, dtype=torch.uint8, device="cuda")
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        for start, end in zip(starts, ends, strict=True):
            flush.zero_()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in zip(starts, ends, strict=True)]

    return replay


def host_clock_run(fn: Callable[[], object]) -> Run:
    """The run of a call on the CPU, by the host's clock."""

    def repeat(repeats: int) -> list[float]:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            fn()
            times.append((time.perf_counter() - start) * 1e6)
        return times

    return repeat


def graph_time(fn: Callable[[], object], ms: float = 120.0) -> tuple[float, float]:
    """Times a CUDA call: (median, 90th minus 10th percentile) in microseconds over about `ms` ms."""
    return _time_alone(graph_run(fn), ms)


def host_clock_time(fn: Callable[[], object], ms: float = 120.0) -> tuple[float, float]:
    """Times a call on the CPU: (median, 90th minus 10th percentile) in microseconds."""
    return _time_alone(host_clock_run(fn), ms)


def time_in_rounds(
    runs: Mapping[str, Run], ms: float = 120.0
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times calls that are to be compared: ({name: microseconds of each call}, {name: failure}).

    They take turns in ROUNDS rounds, about `ms` ms each over all rounds. In a round each makes
    warm-up calls that are not counted and then, without a pause, its share of the counted ones. So
    what the clock and the heat of the card do in the meantime meets all alike.
    """
    samples: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    shares: dict[str, tuple[int, int]] = {}
    for name, run in runs.items():
        try:
            shares[name] = _shares(max(min(run(2)), 1.0), ms)
            samples[name] = []
        except Exception as error:  # other people's libraries may raise anything
            failures[name] = _one_line(error)
    for name in _turns(list(samples)):
        if name in failures:
            continue
        warmup, repeats = shares[name]
        try:
            samples[name] += runs[name](warmup + repeats)[warmup:]
        except Exception as error:
            failures[name] = _one_line(error)
            del samples[name]
    return samples, failures


def _turns(names: list[str]) -> Iterator[str]:
    """Who runs next, through all rounds: each pair of rounds begins with another name, and its
    second round goes backwards, so that a steady drift of the clock cancels."""
    pairs = ROUNDS // 2
    for pair in range(pairs):
        first = len(names) * pair // pairs
        order = names[first:] + names[:first]
        yield from order
        yield from reversed(order)


def _shares(estimate: float, ms: float) -> tuple[int, int]:
    """Warm-up calls and counted calls of one round, for a call of `estimate` microseconds."""
    warmup, repeats = _repeats(estimate, ms)
    return warmup // ROUNDS, math.ceil(repeats / ROUNDS)


def _repeats(estimate: float, ms: float) -> tuple[int, int]:
    """Warm-up calls and counted calls for a call of `estimate` microseconds."""
    warm = estimate * _MIN_REPEATS >= _WARMUP_MS * 1e3  # as soon as a few calls have run
    warmup = 0 if warm else _clamp(_WARMUP_MS * 1e3 / estimate)
    return warmup, _clamp(ms * 1e3 / estimate)


def _time_alone(run: Run, ms: float) -> tuple[float, float]:
    warmup, repeats = _repeats(max(statistics.median(run(3)), 1.0), ms)
    return _median_and_spread(run(warmup + repeats)[warmup:])


def host_time(fn: Callable[[], object], batches: int = 7, calls: int = 50) -> float:
    """Microseconds that an asynchronous CUDA call keeps the host: median over batches of calls."""
    times = []
    for _ in range(batches):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        times.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def measure_case(
    case: Case,
    peers: Mapping[str, Adapter] | None = None,
    ms: float = 120.0,
    device: str | torch.device = "cuda",
    seed: int = 0,
) -> dict:
    """Checks and times one case, and each peer on the same inputs; all take turns.

    Returns {name, us, us_spread, us_with_plan, us_batch_invariant, host_us, tflops, gbps, error,
    peers, peer_host_us}. `us` finds the plan made, `us_with_plan` makes it in the timed call,
    `us_batch_invariant` splits no request (enable_batch_invariant); host_us is None on the CPU.
    `error` is relative_error() of one request. What a peer could not do is its text under `peers`;
    what ours could not do is under `failure`, and the timings are None.
    """
    device = torch.device(device)
    inputs = make_inputs(case, device, seed)
    prepare = graph_run if device.type == "cuda" else host_clock_run
    checked = case.b // 2
    want = reference_request(inputs, checked)
    row: dict = {"name": case.name}
    row.update(dict.fromkeys(("us", "us_spread", "us_with_plan", "us_batch_invariant")))
    row.update(dict.fromkeys(("host_us", "tflops", "gbps")))
    row.update(error=None, peers={}, peer_host_us={})

    def check(call: Callable[[], torch.Tensor]) -> float:
        error = relative_error(call()[checked], want)
        if error > ERROR_LIMIT:
            raise ArithmeticError(f"wrong result: error {error:.2g}, limit {ERROR_LIMIT}")
        return _rounded(error)

    peers = peers or {}
    own: dict[str, Adapter] = {
        "us": ours,
        "us_with_plan": functools.partial(ours, replan=True),
        "us_batch_invariant": functools.partial(ours, batch_invariant=True),
    }
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    runs: dict[str, Run] = {}
    failures: dict[str, str] = {}
    for name, adapter in {**own, **peers}.items():
        try:
            calls[name] = adapter(inputs)
            error = check(calls[name])
            if name == "us":
                row["error"] = error
            runs[name] = prepare(calls[name])
        except Exception as error:  # other people's libraries may raise anything
            failures[name] = _one_line(error)
    samples, failed = time_in_rounds(runs, ms)
    failures.update(failed)
    medians = {name: round(statistics.median(times), 2) for name, times in samples.items()}
    host_us: dict[str, float] = {}
    for name in samples if device.type == "cuda" else ():
        try:
            if name == "us" or name in peers:
                host_us[name] = round(host_time(calls[name]), 2)
        except Exception as error:
            failures[name] = _one_line(error)

    why = [failures[name] for name in own if name in failures]
    if why:  # a case that fails is a row of the result, not the end of the run
        row["failure"] = why[0]
    else:
        us, spread = _median_and_spread(samples["us"])
        row.update({name: medians[name] for name in own})
        row.update(us_spread=round(spread, 2), host_us=host_us.get("us"))
        row["tflops"] = _rounded(case_flop(case, inputs.lengths) / us * 1e-6)
        row["gbps"] = _rounded(case_bytes(case, inputs.lengths) / us * 1e-3)
    for name in peers:
        row["peers"][name] = failures.get(name) or medians[name]
        if name in host_us:
            row["peer_host_us"][name] = host_us[name]
    return row


def case_flop(case: Case, lengths: list[int]) -> float:
    """Floating-point operations: two products per query row and token (the mask saves nothing)."""
    return 2.0 * case.s_q * case.h_q * sum(lengths) * (D_QK + D_V)


def case_bytes(case: Case, lengths: list[int]) -> float:
    """Bytes that must move: every cached token once per KV head, q in and out back."""
    size = DTYPES[case.dtype].itemsize
    rows = case.b * case.s_q * case.h_q
    return float(size) * (sum(lengths) * case.h_kv * D_QK + rows * (D_QK + D_V))


def machine(device: str | torch.device) -> dict:
    """What a result must name: {gpu, driver, cuda, torch, flash_mla}; on the CPU gpu is its ISA."""
    device = torch.device(device)
    facts = {"torch": torch.__version__, "flash_mla": flash_mla.__version__}
    if device.type != "cuda":
        cpu = flash_mla.info()["cpu"]
        return {"gpu": f"cpu-{cpu['isa']}-{cpu['threads']}t", "driver": "", "cuda": "", **facts}
    name = torch.cuda.get_device_name(device)
    return {"gpu": name, "driver": _driver_version(), "cuda": torch.version.cuda, **facts}


def measure_ceilings(device: str | torch.device) -> dict[str, float]:
    """What this device reaches on the plainest work: {"gbps": of a large copy, "tflops": of a
    large product} (bf16 on a GPU, fp32 on the CPU, where the decode's sums are fp32 too)."""
    device = torch.device(device)
    return {"gbps": _copy_gbps(device), "tflops": _product_tflops(device)}


def _copy_gbps(device: torch.device) -> float:
    clock, count = (graph_time, 2**30) if device.type == "cuda" else (host_clock_time, 2**26)
    source = torch.zeros(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    us, _ = clock(lambda: target.copy_(source))
    return 2.0 * source.nbytes / us * 1e-3


def _product_tflops(device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    clock, n, dtype = (
        (graph_time, 8192, torch.bfloat16) if on_gpu else (host_clock_time, 1024, torch.float32)
    )
    matrix = torch.randn(n, n, dtype=dtype, device=device)
    out = torch.empty_like(matrix)
    us, _ = clock(lambda: torch.mm(matrix, matrix, out=out))
    return 2.0 * n**3 / us * 1e-6


def _median_and_spread(times: list[float]) -> tuple[float, float]:
    deciles = statistics.quantiles(times, n=10)
    return statistics.median(times), deciles[-1] - deciles[0]


def _clamp(repeats: float) -> int:
    return int(min(max(repeats, _MIN_REPEATS), _MAX_REPEATS))


def _driver_version() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
