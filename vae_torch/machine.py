"""The device of a run, and what of this machine decides how long a run takes, not what it gives."""

import os
import shlex
import subprocess
import sys
import time

import torch
from torch import Tensor

from vae_torch.config import ConfigError, check_device

_WITHOUT_FLOAT64 = ("mps",)  # kinds of devices


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the CPU where its device, an Apple GPU, has no such numbers."""
    return (tensor.cpu() if tensor.device.type in _WITHOUT_FLOAT64 else tensor).double()


def resolve_device(name: str) -> torch.device:
    """The torch device that `device=` names.

    Raises:
        ConfigError: Another word, or a GPU is asked for and is not there.
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
    """Which of this machine's GPUs the job of a sweep takes, where it names none: each in turn."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{job % count}" if count > 1 and name in ("auto", "cuda") else name


def device_name(device: torch.device) -> str:
    """Device, its model where it has a name, and the threads that a CPU run used."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "mps (Apple GPU)"
    threads = torch.get_num_threads()
    return f"cpu ({threads} {'thread' if threads == 1 else 'threads'})"


def tune_cpu(threads: int | None) -> None:
    """Processor settings that change no figure, only how long it takes. Call before any tensor."""
    # Adam's first moments decay into denormal numbers, which make a step twice as slow. Threads
    # inherit the setting where they start, so it stands before the first parallel operation.
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)


def set_products(precision: str, device: torch.device) -> None:
    """How exact fp32 matrix products and convolutions are, and which library computes them.

    Process-wide. `medium` lets them be quicker: TF32 on CUDA; on a CPU with AVX-512 oneDNN takes
    over from MKL, with bf16 inside where there are matrix units for it. Where there are none,
    oneDNN is as exact as MKL and far quicker on AMD's processors, whose AVX-512 MKL does not use:
    so there fp32 takes oneDNN too. On CUDA convolutions give the same bits every time.
    """
    torch.backends.cudnn.allow_tf32 = precision == "medium"  # torch's default is True
    torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("medium")
    if precision != "medium" and (device.type != "cpu" or not _products_are_fp32()):
        torch.set_float32_matmul_precision("highest")


def _products_are_fp32() -> bool:
    """Whether this one product is off by what fp32 rounds: 2e-6 of its scale. With bf16: 1e-1."""
    a = torch.arange(128.0 * 784).sin().view(128, 784)
    b = torch.arange(784.0 * 512).sin().view(784, 512)
    exact = a.double() @ b.double()
    return bool((a @ b - exact).abs().max() < 1e-4 * exact.abs().max())


def cpp_compiler() -> str:
    """What torch.compile will build its CPU code with; a refusal where it does not run."""
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
    """How long a bf16 matrix product takes on this CPU, measured, in units of an fp32 one."""

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
    """What to say where `bf16_factor` is above one."""
    return (
        f"precision=bf16: a matrix product takes {factor:.3g} times as long as with fp32 here; "
        "this processor has no bf16 arithmetic, precision=fp32 is quicker"
    )


class BusyCores:
    """Notices when other jobs keep the cores busy: threads that wait for each other crawl then.

    A thread that has a core to itself uses a processor second a second, also while it waits for
    the others. Where `threads` threads get much less, they share their cores.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._said = threads == 1
        self._was = time.process_time(), time.perf_counter()

    def hint(self) -> str | None:
        """What to do about it, once; None while all was well since the last call."""
        was, self._was = self._was, (time.process_time(), time.perf_counter())
        cpu, wall = (now - then for now, then in zip(self._was, was, strict=True))
        if self._said or not cores_are_shared(cpu, wall, self.threads):
            return None
        self._said = True
        return (
            f"{self.threads} threads got {cpu / wall:.1f} processor seconds a second: other jobs "
            "keep the cores busy, and a step waits for its slowest thread; threads=1 is several "
            "times faster beside them"
        )


def cores_are_shared(cpu: float, wall: float, threads: int) -> bool:
    """Whether `threads` threads got too little: processor seconds against the clock's."""
    return wall > 1 and cpu < 0.7 * threads * wall
