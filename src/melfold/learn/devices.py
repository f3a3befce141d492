"""Devices, their mixed precision, memory and threads: the only module that knows them.

What makes a GPU repeat itself, and what it costs:

- `cudnn.deterministic`, and not `cudnn.benchmark`: one algorithm for each convolution, always the same. Training may turn
  `benchmark` on (`train.benchmark`): it times the algorithms that repeat themselves and takes the fastest, so another run may
  take another one and differ in the last digits. Prediction never does.
- `torch.use_deterministic_algorithms`: the other operations. It only warns where PyTorch has no repeatable form.
- `CUBLAS_WORKSPACE_CONFIG`: cuBLAS repeats itself only with a workspace of fixed size. It is read when CUDA starts, so it is set
  as soon as a GPU is picked.

On the same card with the same versions this gives the same bytes; another card or version gives other last digits.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from melfold.errors import MelfoldError, first_line


@dataclass(frozen=True)
class Device:
    """Where a model runs. `amp`: the dtype of mixed precision in training, or None."""

    torch: torch.device
    amp: torch.dtype | None

    @property
    def precision(self) -> str:
        """Of training: `bf16`, `fp16` or `fp32`."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.amp, "fp32")

    def describe(self) -> str:
        """The device and its precision, for people."""
        name = f" ({torch.cuda.get_device_name(self.torch)})" if self.torch.type == "cuda" else ""
        return f"{self.torch}{name}, {self.precision}"

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Mixed precision, where there is any."""
        return torch.autocast(self.torch.type, self.amp) if self.amp else contextlib.nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler, which does nothing unless training is in fp16."""
        return torch.amp.GradScaler(self.torch.type, enabled=self.amp == torch.float16)

    def pinned(self, values: np.ndarray) -> torch.Tensor:
        """An array as a tensor that the device can read while it computes: in page-locked memory if it is a GPU."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self.torch.type == "cuda" else tensor

    def tensor(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
        """An array, or what `pinned` made of it, on the device."""
        tensor = values if isinstance(values, torch.Tensor) else self.pinned(values)
        return tensor.to(self.torch, non_blocking=True)

    def log_mels(self, batch: np.ndarray | torch.Tensor) -> torch.Tensor:
        """float16 `(clips, frames, n_mels)` -> float32 dB `(clips, 1, n_mels, frames)` on the device."""
        return self.tensor(batch).float().transpose(1, 2).unsqueeze(1)

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.torch.type == "cuda":
            torch.cuda.synchronize(self.torch)

    def reset_peak_memory(self) -> None:
        """Count `peak_memory` from here; on the CPU it is always that of the whole process."""
        if self.torch.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.torch)

    def peak_memory(self) -> int:
        """Bytes: the most that tensors took on a GPU, or that this process took on the CPU."""
        if self.torch.type == "cuda":
            return torch.cuda.max_memory_allocated(self.torch)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pick_device(name: str = "auto", amp: str = "auto") -> Device:
    """Choose a device.

    Args:
        name: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        amp: `auto` for bf16 where the processor has it natively, fp16 on older GPUs, else nothing; or `off`.

    Raises:
        MelfoldError: a device that is not there.
    """
    device = find_device(name)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return Device(device, _amp_dtype(device) if amp == "auto" else None)


def find_device(name: str) -> torch.device:
    """The device of a name as `pick_device` takes it. Nothing is started on it: no memory of a GPU is taken.

    Raises:
        MelfoldError: a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    unknown = MelfoldError("unknown device", repr(name), "Use auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown from None
    if device.type not in ("cpu", "cuda"):
        raise unknown
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MelfoldError("no such device", f"{name}; CUDA devices here: {torch.cuda.device_count()}", "Use --device cpu")
    return device


def _amp_dtype(device: torch.device) -> torch.dtype | None:
    if device.type == "cuda":
        # A T4 emulates bf16 slowly: fp16 there.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.backends.mkldnn.is_available() and _cpu_multiplies_bf16() else None


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU multiplies matrices of bf16.

    AVX-512's bf16 alone does not count: with it, training four models took 1.1 to 1.6 times as long as in float32.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        flags = torch.cpu.get_capabilities()
        return any(flags.get(name, False) for name in ("amx_bf16", "sve_bf16"))
    return torch.cpu._is_amx_tile_supported()  # before torch 2.11


def shared_threads(devices: Sequence[str]) -> dict[str, str]:
    """The environment of each of several processes that train at once: those on the CPU share its threads out."""
    on_cpu = sum(name == "cpu" for name in devices)
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // on_cpu))} if on_cpu > 1 else {}


@contextlib.contextmanager
def exact(*, benchmark: bool = False) -> Iterator[None]:
    """Operations that repeat themselves, and float32 that is float32.

    Args:
        benchmark: let cuDNN time its algorithms and take the fastest: see above.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, benchmark, False, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a fill for each tensor that is about to be written anyway
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def repeatable(seed: int, device: Device, *, benchmark: bool = False) -> Iterator[None]:
    """`exact`, with the global generators seeded: dropout and initial weights draw from them.

    Afterwards they are as before: the CPU's and, if the device is a GPU, those of all GPUs, since PyTorch seeds all at once.
    """
    gpus = range(torch.cuda.device_count()) if device.torch.type == "cuda" else ()
    with torch.random.fork_rng(gpus), exact(benchmark=benchmark):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def explain_out_of_memory(device: Device, fix: str) -> Iterator[None]:
    """Turn a GPU's lack of memory into a `MelfoldError` with this way to fix it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MelfoldError(f"{device.torch} has not enough memory", first_line(error), fix) from None
