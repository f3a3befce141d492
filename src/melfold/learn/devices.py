"""Devices, their mixed precision and their threads: the only module that knows them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from melfold.errors import MelfoldError


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

    def log_mels(self, batch: np.ndarray) -> torch.Tensor:
        """float16 `(clips, frames, n_mels)` -> float32 dB `(clips, 1, n_mels, frames)` on the device."""
        tensor = torch.from_numpy(batch)
        if self.torch.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.torch, non_blocking=True).float().transpose(1, 2).unsqueeze(1)

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        """An array on the device."""
        tensor = torch.from_numpy(values)
        if self.torch.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.torch, non_blocking=True)


def pick_device(name: str = "auto", amp: str = "auto") -> Device:
    """Choose a device.

    Args:
        name: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        amp: `auto` for bf16 where the processor has it natively, fp16 on older GPUs, else nothing; or `off`.

    Raises:
        MelfoldError: a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MelfoldError("unknown device", repr(name), "Use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MelfoldError("no such device", f"{name}; CUDA devices here: {torch.cuda.device_count()}", "Use --device cpu")
    return Device(device, _amp_dtype(device) if amp == "auto" else None)


def _amp_dtype(device: torch.device) -> torch.dtype | None:
    if device.type == "cuda":
        # A T4 emulates bf16 slowly: fp16 there.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    # Without these instructions a CPU emulates bf16 more slowly than it computes in float32.
    return torch.bfloat16 if torch.backends.mkldnn.is_available() and _cpu_has_bf16() else None


def _cpu_has_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        flags = torch.cpu.get_capabilities()
        return any(flags.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    return torch.cpu._is_avx512_bf16_supported()  # before torch 2.11


def shared_threads(devices: Sequence[str]) -> dict[str, str]:
    """The environment of each of several processes that train at once: those on the CPU share its threads out."""
    on_cpu = sum(name == "cpu" for name in devices)
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // on_cpu))} if on_cpu > 1 else {}


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Deterministic kernels, and float32 that is float32."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = before


@contextlib.contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """`exact`, with the global generators (dropout and initial weights draw from them) seeded and given back."""
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        with exact():
            yield
    finally:
        torch.set_rng_state(before)
