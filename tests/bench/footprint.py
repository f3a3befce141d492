"""What a recipe needs on a GPU, found without one: operations and memory of a training step, and waits for the device.

Everything runs on PyTorch's fake tensors: they have shapes, types and devices but no values. A tensor on the wrong device is an
error, as on a real GPU. PyTorch's own backward pass needs a device even for fake tensors, so there is one in Python here, which
calls the same gradient functions.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from melfold.config import Recipe
from melfold.learn.batches import Batch
from melfold.learn.devices import Device
from melfold.learn.model import Tagger, build_model
from melfold.learn.state import TrainState
from melfold.learn.train import train_step

_BLOCK = 512
"""Bytes: PyTorch's CUDA allocator rounds up to this."""
T4_BYTES = int(14.5 * 2**30)
"""What a "16 GB" T4 lets a process use."""
_BESIDE_BYTES = int(1.0 * 2**30)
"""CUDA's context and the libraries' workspaces, which no tensor shows."""
_FRAGMENTS = 1.1
"""The allocator's losses, roughly."""

_read = torch.ops.aten._local_scalar_dense.default


class FakeGpu(TorchDispatchMode):
    """Counts what tensors take on a GPU, and how often the program waits for it.

    `live`, `peak`: bytes. `waits`: the operations that brought a value from the device to the program.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.waits: list[str] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _read:  # fake tensors have no values: 1 stands for every loss scale, counter and flag
            if args[0].device.type == "cuda":
                self.waits.append(str(func))
            return 1.0 if args[0].dtype.is_floating_point else 1
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._count(tensor.untyped_storage())
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cuda" and result.device.type == "cpu":
            self.waits.append(str(func))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // _BLOCK) * _BLOCK
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Within it, new tensors are fake and `cuda` is a device like any other, whether or not this machine has one.

    Make models before: `model.to("cuda")` then moves them onto the fake device.
    """
    generator = torch.Generator
    backward = Backward()
    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch, "Generator", lambda device=None: generator()),
        (torch, "inference_mode", lambda on=True: torch.no_grad() if on else contextlib.nullcontext()),
        (torch.Tensor, "pin_memory", lambda self, *_: self),
        (torch.Tensor, "numpy", _numpy),
        (torch.Tensor, "backward", backward),
        (FakeTensor, "__deepcopy__", _copy),
    ]
    gpu = FakeGpu()
    with contextlib.ExitStack() as stack:
        for owner, name, value in stand_ins:
            stack.enter_context(_replaced(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(gpu)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(backward.pack, backward.unpack))
        yield gpu


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:  # it was inherited
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _numpy(tensor: torch.Tensor, **_: Any) -> np.ndarray:
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} tensor to numpy. Use Tensor.cpu() to copy it to host memory first.")
    return np.zeros(tuple(tensor.shape), np.dtype(str(tensor.dtype).removeprefix("torch.")))


def _copy(tensor: torch.Tensor, memo: dict[int, torch.Tensor]) -> torch.Tensor:
    return memo.setdefault(id(tensor), tensor.detach().clone().requires_grad_(tensor.requires_grad))


class Backward:
    """`Tensor.backward`, in Python. What the forward pass saved is freed as soon as it was used, as PyTorch does.

    `pack` and `unpack` are its hooks for `torch.autograd.graph.saved_tensors_hooks`.
    """

    def __init__(self) -> None:
        self._kept: dict[int, torch.Tensor] = {}
        self._used: list[int] = []
        self._next = 0

    def pack(self, tensor: torch.Tensor) -> int:
        """Keep a tensor. Returns: its number."""
        self._next += 1
        self._kept[self._next] = tensor.detach()
        return self._next

    def unpack(self, key: int) -> torch.Tensor:
        """The tensor of a number, which is freed after the gradient function that asks for it."""
        self._used.append(key)
        return self._kept[key]

    def __get__(self, tensor: torch.Tensor, owner: type | None = None) -> Callable[[], None]:
        return lambda: self.run(tensor)

    @torch.no_grad()
    def run(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss to every parameter's `grad`."""
        order = _sorted(loss.grad_fn)
        waiting: dict[Any, dict[int, torch.Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
        while order:
            node = order.pop()
            own = waiting.pop(node, {})
            if not own:
                continue
            if hasattr(node, "variable"):
                gradient = own[0].detach()
                node.variable.grad = gradient if node.variable.grad is None else node.variable.grad + gradient
                continue
            results = node(*(own.get(number) for number in range(len(node._input_metadata))))
            del own
            for key in self._used:
                self._kept.pop(key, None)
            self._used.clear()
            for (following, number), gradient in zip(node.next_functions, _tuple(results), strict=True):
                if following is not None and gradient is not None:
                    _add(waiting.setdefault(following, {}), number, gradient, following._input_metadata[number])
            del results
        self._kept.clear()  # what no gradient function asked for


def _add(waiting: dict[int, torch.Tensor], number: int, gradient: torch.Tensor, expected: Any) -> None:
    """Add a gradient in the shape and type that its function expects."""
    if tuple(gradient.shape) != tuple(expected.shape):
        gradient = gradient.sum_to_size(expected.shape)
    if gradient.dtype != expected.dtype:
        gradient = gradient.to(expected.dtype)
    waiting[number] = waiting[number] + gradient if number in waiting else gradient


def _tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _sorted(root: Any) -> list[Any]:
    """The gradient functions below one, each after all that it leads to."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, left = stack.pop()
        if left:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return order


@dataclass(frozen=True)
class Footprint:
    """A training step on a GPU.

    Args:
        batch_size, micro_batch: crops of a step, and of its parts.
        parameters: of the model.
        flops: operations a crop takes, forward and backward; a multiplication and an addition are two.
        peak: bytes that tensors take at most.
        waits: how often a step waits for the device.
    """

    batch_size: int
    micro_batch: int
    parameters: int
    flops: float
    peak: int
    waits: int

    @property
    def needed(self) -> int:
        """Bytes of a card, with what no tensor shows."""
        return int(self.peak * _FRAGMENTS) + _BESIDE_BYTES


def fake_batch(recipe: Recipe, size: int, labels: int) -> tuple[Batch, np.ndarray]:
    """A batch of silence, every second clip of it noisy if the recipe uses noisy clips; and its targets."""
    noisy = (np.arange(size) % 2 == 1) & recipe.uses_noisy
    log_mels = np.zeros((size, recipe.crop_frames, recipe.logmel.n_mels), np.float16)
    return Batch(log_mels, np.arange(size), noisy), np.zeros((size, labels), np.float32)


def fake_state(recipe: Recipe, model: Tagger, amp: torch.dtype | None) -> TrainState:
    """The state of a training on the fake GPU; call it within `fake_gpu`."""
    return TrainState(model, recipe.train, Device(torch.device("cuda"), amp))


def trained_model(recipe: Recipe, labels: int) -> Tagger:
    """A recipe's model as training makes it, with random weights."""
    model = build_model(recipe.model, labels, recipe.logmel.n_mels, recipe.crop_frames, initial=False)
    if recipe.uses_noisy and recipe.noisy.own_head:
        model.add_noisy_head()
    if recipe.uses_noisy and recipe.noisy.own_norm:
        model.normalise.set_noisy(-50.0, 20.0)
    return model


def footprint(recipe: Recipe, labels: int = 80, amp: torch.dtype | None = torch.float16, micro_batch: int = 0) -> Footprint:
    """Run a training step of a recipe on the fake GPU; not the very first, whose optimizer has no moments yet.

    Args:
        micro_batch: as in the recipe, which it replaces where it is not 0.
    """
    if micro_batch:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": micro_batch})})
    model, size = trained_model(recipe, labels), recipe.train.batch_size
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops})
    batch, targets = fake_batch(recipe, size, labels)
    with fake_gpu() as gpu:
        state = fake_state(recipe, model, amp)
        _first_update(state)
        gpu.waits.clear()
        with counter:
            train_step(state, batch, targets, recipe, np.random.default_rng(0))
    parameters = sum(p.numel() for p in model.parameters())
    part = recipe.train.micro_batch or size
    return Footprint(size, part, parameters, counter.get_total_flops() / size, gpu.peak, len(gpu.waits))


def _first_update(state: TrainState) -> None:
    state.scaler.scale(torch.zeros((), device=state.device.torch))
    for parameter in state.trained:
        parameter.grad = torch.zeros_like(parameter)
    state.update()


def largest_batch(small: Footprint, large: Footprint, memory: int = T4_BYTES) -> int:
    """How many crops fit a card at once, from two footprints of a recipe: memory grows evenly with the crops.

    Returns:
        A multiple of 8 where it is more than that; 0, if not even one crop fits.
    """
    per_crop = (large.needed - small.needed) / (large.micro_batch - small.micro_batch)
    crops = small.micro_batch + (memory - small.needed) / per_crop
    return max(0, int(crops) // 8 * 8 if crops >= 8 else int(crops))


def _convolution_backward_flops(gradient: Any, inputs: Any, weight: Any, *args: Any, **_: Any) -> int:
    """As for the forward pass, once for each of the two gradients; PyTorch's own count is wrong for depthwise convolutions."""
    wanted = args[7]
    return conv_flop_count(inputs, weight, gradient) * (wanted[0] + wanted[1])
