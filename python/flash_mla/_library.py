"""Loads the compiled extension and answers what is asked of it outside PyTorch's operators."""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "flash_mla needs PyTorch >= 2.10, which is not installed: pip install torch", name="torch"
    ) from None

_TEXT_SIZE = 512


def _check_torch_version() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 10):
        raise ImportError(f"flash_mla needs PyTorch >= 2.10, found {torch.__version__}")


def _find_extension() -> pathlib.Path:
    # An editable install keeps the extension in another folder of the package's path than the
    # sources.
    import flash_mla

    for folder in flash_mla.__path__:
        path = pathlib.Path(folder) / "_C.abi3.so"
        if path.exists():
            return path
    raise ImportError(
        "flash_mla: the compiled extension _C.abi3.so is missing; install the package with `pip install .` "
        "or build it in place with `make build`"
    )


def _load() -> ctypes.CDLL:
    _check_torch_version()
    path = _find_extension()
    if hasattr(torch.ops.flash_mla, "decode"):
        raise ImportError(
            "flash_mla: another copy of the package has registered the operators torch.ops.flash_mla in this process"
        )
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    library.flash_mla_python_version.restype = ctypes.c_char_p
    library.flash_mla_python_cpu_isa.restype = ctypes.c_char_p
    library.flash_mla_python_plan_size.argtypes = [
        ctypes.c_int32,
        *[ctypes.c_int64] * 4,
        ctypes.c_char_p,
        ctypes.c_int32,
    ]
    return library


_LIBRARY = _load()

_ERROR_TYPES = {
    1: ValueError,
    2: TypeError,
    3: NotImplementedError,
}  # StatusCode of status.h; others: RuntimeError


def version() -> str:
    """The library's version, for example "0.1.0"."""
    return _LIBRARY.flash_mla_python_version().decode()


def cuda_build_version() -> int:
    """CUDA toolkit of the build, 13000 for 13.0; 0 when it was built without CUDA."""
    return _LIBRARY.flash_mla_python_cuda_build_version()


def cpu_isa() -> str:
    """The instruction set that the CPU backend chose on this machine."""
    return _LIBRARY.flash_mla_python_cpu_isa().decode()


def cpu_num_threads() -> int:
    """Threads of the CPU backend: PyTorch's number, from the first call on the CPU."""
    return _LIBRARY.flash_mla_python_cpu_num_threads()


def cuda_device_count() -> int:
    """CUDA devices that the driver shows; 0 without a driver or without CUDA in the build."""
    return _LIBRARY.flash_mla_python_cuda_device_count()


@dataclass(frozen=True)
class CudaDevice:
    """A CUDA device as the library sees it; `why_not` says why it is not supported."""

    index: int
    name: str
    capability: tuple[int, int]
    sms: int
    memory: int
    driver_version: int
    supported: bool
    why_not: str


def cuda_device(index: int) -> CudaDevice:
    """What the library knows about CUDA device `index`; when it cannot be asked, `why_not` holds the error."""
    numbers = (ctypes.c_int64 * 6)()
    name = ctypes.create_string_buffer(_TEXT_SIZE)
    why_not = ctypes.create_string_buffer(_TEXT_SIZE)
    _LIBRARY.flash_mla_python_cuda_device_info(index, numbers, name, why_not, _TEXT_SIZE)
    major, minor, sms, memory, driver_version, supported = numbers
    return CudaDevice(
        index,
        name.value.decode(),
        (major, minor),
        sms,
        memory,
        driver_version,
        bool(supported),
        why_not.value.decode(),
    )


def fast_decode() -> Callable | None:
    """The extension's eager decode (bindings/fast_decode.cpp), or None where this build or this PyTorch lacks what it needs."""
    try:
        make = ctypes.PyDLL(_LIBRARY._name).flash_mla_python_fast_decode
        arguments = (
            torch.Tensor.__dlpack_c_exchange_api__,
            torch.Tensor,
            torch._C._dynamo.guards._empty_strided_cpu,
            torch._C._dynamo.guards._empty_strided_cuda,
            torch.bfloat16,
            torch.float16,
            torch.float32,
            (
                torch._C._len_torch_function_stack,
                torch._C._len_torch_dispatch_stack,
                torch._C._is_tracing,
                torch._C._autograd._profiler_enabled,
            ),
            "requires_grad",
        )
    except AttributeError:
        return None
    make.argtypes = [ctypes.py_object] * len(arguments)
    make.restype = ctypes.py_object
    return make(*arguments)


def plan_size(device: torch.device, s_q: int, h_q: int, h_kv: int, page_size: int) -> int:
    """Rows of the plan for these shapes on `device` (num_sm_parts)."""
    cuda_device = -1 if device.type != "cuda" else device.index or 0
    text = ctypes.create_string_buffer(_TEXT_SIZE)
    rows = _LIBRARY.flash_mla_python_plan_size(
        cuda_device, s_q, h_q, h_kv, page_size, text, _TEXT_SIZE
    )
    if rows < 0:
        raise _ERROR_TYPES.get(-rows, RuntimeError)(text.value.decode())
    return rows
