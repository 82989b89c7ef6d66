"""The device of a run, and machine settings that decide its speed but not its results."""

import ctypes
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from vae_torch.config import ConfigError, check_device

_WITHOUT_FLOAT64 = ("mps",)  # kinds of devices
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h, in bytes


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the CPU where its device, an Apple GPU, has no such numbers."""
    return (tensor.cpu() if tensor.device.type in _WITHOUT_FLOAT64 else tensor).double()


def resolve_device(name: str) -> torch.device:
    """The torch device that `device=` names.

    Raises:
        ConfigError: An unknown name, or a GPU is asked for and not available.
    """
    check_device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    apple = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if count else "mps" if apple else "cpu")
    if name == "mps" and not apple:
        raise ConfigError("device=mps: torch finds no Apple GPU on this machine; use device=cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device={name}: this machine has {count} CUDA devices; use device=cpu")
    return device


def device_of_job(name: str, job: int) -> str:
    """The GPU of a sweep's job, in rotation, unless the settings name one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{job % count}" if count > 1 and name in ("auto", "cuda") else name


def device_name(device: torch.device) -> str:
    """The device with its model, or the CPU with its number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "mps (Apple GPU)"
    threads = torch.get_num_threads()
    return f"cpu ({threads} {'thread' if threads == 1 else 'threads'})"


def tune_cpu(threads: int | None) -> None:
    """Processor settings that change speed, not results. Call it before any tensor is made."""
    # Adam's first moments decay into denormal numbers, which halve the speed. Threads inherit
    # the setting when they start, so it comes before the first parallel operation.
    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        keep_memory(ctypes.CDLL(None).mallopt)
    if threads:
        torch.set_num_threads(threads)


def keep_memory(mallopt: Callable[[int, int], int]) -> None:
    """Have glibc keep up to 1 GiB of freed memory for the next tensors.

    It gives the memory of every larger tensor back to the system, and fetches it again, page by
    page, for the next one. Versions before 2.35 refuse a threshold above 32 MiB. Without any the
    other setting would do harm: it ends glibc's own adaptation.
    """
    if mallopt(_MMAP_THRESHOLD, 1 << 28) or mallopt(_MMAP_THRESHOLD, 1 << 25):
        mallopt(_TRIM_THRESHOLD, 1 << 30)


def set_products(precision: str, device: torch.device) -> None:
    """Set precision and library of fp32 matrix multiplications and convolutions.

    Process-wide. `medium` is faster and less exact: TF32 on CUDA; on a CPU with AVX-512, oneDNN
    instead of MKL, with bf16 inside where there are matrix units for it. Without such units oneDNN
    is as exact as MKL and much faster on AMD processors, where MKL does not use AVX-512; fp32 uses
    oneDNN there too. On CUDA, convolutions give the same bits every time.
    """
    torch.backends.cudnn.allow_tf32 = precision == "medium"  # torch's default is True
    torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("medium")
    if precision != "medium" and (device.type != "cpu" or not _products_are_fp32()):
        torch.set_float32_matmul_precision("highest")


def _products_are_fp32() -> bool:
    """Whether a test multiplication is off by fp32 rounding, 2e-6 of its scale; bf16: 1e-1."""
    a = torch.arange(128.0 * 784).sin().view(128, 784)
    b = torch.arange(784.0 * 512).sin().view(784, 512)
    exact = a.double() @ b.double()
    return bool((a @ b - exact).abs().max() < 1e-4 * exact.abs().max())


def cpp_compiler() -> str:
    """The compiler that torch.compile uses for CPU code; raises if it does not run."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    command = [*shlex.split(name), "--version"]
    try:
        runs = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        runs = False
    if not runs:
        raise ConfigError(
            f"compile=true: no C++ compiler ({name}) that runs on this machine; install one "
            "(Debian: apt install g++), or use compile=false"
        )
    return name


def bf16_factor() -> float:
    """Time of a bf16 matrix multiplication on this CPU, measured in units of an fp32 one."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(128, 784, dtype=dtype), torch.ones(784, 512, dtype=dtype)
        times = []
        for _ in range(12):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def slow_bf16(factor: float) -> str:
    """The warning for a `bf16_factor` above one."""
    return (
        f"precision=bf16: a matrix multiplication takes {factor:.3g} times as long as with fp32 "
        "here, since this processor has no bf16 arithmetic; use precision=fp32"
    )


class BusyCores:
    """Detects that other jobs keep the cores busy, which slows down threads that wait.

    A thread with a core to itself uses one processor second per second, even while it waits for
    other threads. If `threads` threads get much less, they share their cores.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._said = threads == 1
        self._was = time.process_time(), time.perf_counter()

    def hint(self) -> str | None:
        """Advice, once; None if nothing was wrong since the last call."""
        was, self._was = self._was, (time.process_time(), time.perf_counter())
        cpu, wall = (now - then for now, then in zip(self._was, was, strict=True))
        if self._said or not cores_are_shared(cpu, wall, self.threads):
            return None
        self._said = True
        return (
            f"{self.threads} threads got {cpu / wall:.1f} processor seconds per second: other jobs "
            "keep the cores busy, and a step waits for its slowest thread; use threads=1, which is "
            "several times faster then"
        )


def cores_are_shared(cpu: float, wall: float, threads: int) -> bool:
    """Whether `threads` threads got too little: processor seconds against the clock's."""
    return wall > 1 and cpu < 0.7 * threads * wall
