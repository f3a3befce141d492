"""Training, resuming and predicting on a GPU, checked on fake tensors: right devices, few waits, known memory."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from melfold.config import Recipe
from melfold.errors import MelfoldError
from melfold.learn import devices
from melfold.learn.devices import Device, exact, explain_out_of_memory, find_device, pick_device, repeatable
from melfold.learn.predict import predict_logits
from melfold.learn.state import TrainState
from melfold.learn.train import train_step
from melfold.recipes import load_recipe
from tests.bench.footprint import (
    Backward,
    fake_batch,
    fake_gpu,
    fake_state,
    footprint,
    largest_batch,
    trained_model,
)

TINY = (
    "logmel.n_mels=32",
    "model.kwargs={depths=[1, 1, 1, 1], dims=[8, 16, 16, 16]}",
    "train.crop_seconds=0.64",
    "train.batch_size=8",
)
EVERYTHING = (
    "train.clips=both",
    "noisy.bootstrap=0.2",
    "augment.mixup_prob=0.5",
    "augment.freq_masks=1",
    "augment.time_masks=1",
    "augment.gain_db=3",
    "augment.concat_prob=0.5",
    "augment.resize_prob=0.5",
    "model.drop_rate=0.1",
)
GPU, CPU = Device(torch.device("cuda"), torch.float16), pick_device("cpu", "off")
LABELS = 5


def tiny(*sets: str) -> Recipe:
    return load_recipe("demo", [*TINY, *sets])


def fake_steps(recipe: Recipe, amp: torch.dtype | None = torch.float16, steps: int = 2) -> tuple[TrainState, list[str]]:
    """Some steps on the fake GPU. Returns: the state, and the waits of the last step."""
    model, (batch, targets) = trained_model(recipe, LABELS), fake_batch(recipe, recipe.train.batch_size, LABELS)
    with fake_gpu() as gpu:
        state = fake_state(recipe, model, amp)
        for step in range(steps):
            gpu.waits.clear()
            loss, norm = train_step(state, batch, targets, recipe, np.random.default_rng(step))
        assert loss.device.type == norm.device.type == "cuda"
    return state, gpu.waits


@dataclass
class Silence:
    """A store of clips that hold nothing."""

    frames: np.ndarray
    n_mels: int = 32

    @property
    def fnames(self) -> list[str]:
        return [f"{number}.wav" for number in range(len(self.frames))]

    def read(self, row: int, start: int, out: np.ndarray, pad: str) -> None:
        out[:] = 0


@pytest.mark.parametrize(
    ("amp", "sets"),
    [
        (torch.float16, EVERYTHING),
        (torch.bfloat16, (*EVERYTHING, "augment.mixup=db", "model.head=norm_linear", "train.layer_decay=0.9")),
        (torch.float16, (*EVERYTHING, "noisy.own_head=false", "train.loss=lsep", "train.micro_batch=3")),
        (None, (*EVERYTHING, "noisy.own_norm=false", "train.loss=focal", "model.frozen=true")),
    ],
)
def test_a_training_step_stays_on_the_gpu_and_never_waits_for_it(amp: torch.dtype | None, sets: tuple[str, ...]) -> None:
    state, waits = fake_steps(tiny(*sets), amp)
    assert waits == []
    assert {value.device.type for value in state.averaged.state_dict().values()} == {"cuda"}


def test_without_a_fused_optimizer_only_the_loss_scale_is_waited_for() -> None:
    _, waits = fake_steps(tiny("train.optimizer=radam"))
    assert len(waits) == 1
    _, waits = fake_steps(tiny("train.optimizer=radam"), torch.bfloat16)
    assert waits == []


def test_a_gpu_gets_the_fused_optimizer_and_the_cpu_keeps_its_own() -> None:
    state, _ = fake_steps(tiny(), steps=1)
    assert state.optimizer.param_groups[0]["fused"] is True
    recipe = tiny()
    assert not TrainState(trained_model(recipe, LABELS), recipe.train, CPU).optimizer.param_groups[0]["fused"]


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").is_file() or platform.machine() != "x86_64", reason="reads Linux's list of what an x86 can do"
)
def test_an_x86_processor_trains_in_bf16_only_if_it_multiplies_matrices_of_it() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert pick_device("cpu").amp == (torch.bfloat16 if "amx_bf16" in flags else None)


def test_statistics_left_on_the_cpu_are_found() -> None:
    recipe = tiny(*EVERYTHING)
    model, (batch, targets) = trained_model(recipe, LABELS), fake_batch(recipe, 8, LABELS)
    with fake_gpu():
        state = fake_state(recipe, model, torch.float16)
        model.normalise.set_noisy(-40.0, 10.0)  # after the model was moved
        with pytest.raises(RuntimeError, match="same device"):
            train_step(state, batch, targets, recipe, np.random.default_rng(0))


def test_targets_left_on_the_cpu_are_found() -> None:
    class Forgetful(Device):
        def tensor(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
            return self.pinned(values) if isinstance(values, np.ndarray) else super().tensor(values)

    recipe = tiny()
    model, (batch, targets) = trained_model(recipe, LABELS), fake_batch(recipe, 8, LABELS)
    batch = replace(batch, log_mels=torch.from_numpy(batch.log_mels))
    with fake_gpu():
        state = TrainState(model, recipe.train, Forgetful(torch.device("cuda"), None))
        with pytest.raises(RuntimeError, match="same device"):
            train_step(state, batch, targets, recipe, None)


def test_values_that_the_program_reads_are_counted() -> None:
    with fake_gpu() as gpu:
        loss = torch.zeros((), device="cuda")
        float(loss)
        loss.cpu()
        with pytest.raises(TypeError, match="cuda"):
            loss.numpy()
    assert len(gpu.waits) == 2


@pytest.mark.parametrize(("optimizer", "place"), [("adamw", "cuda"), ("radam", "cpu")])
def test_after_a_resume_step_counters_are_where_the_optimizer_wants_them(tmp_path: Path, optimizer: str, place: str) -> None:
    recipe = tiny(f"train.optimizer={optimizer}")
    batch, targets = fake_batch(recipe, 8, LABELS)
    on_cpu = TrainState(trained_model(recipe, LABELS), recipe.train, CPU)
    train_step(on_cpu, batch, targets, recipe, None)
    on_cpu.save(tmp_path / "checkpoint.pt", {})
    model = trained_model(recipe, LABELS)
    with fake_gpu() as gpu:
        state = fake_state(recipe, model, None)
        state.load(tmp_path / "checkpoint.pt", {})
        kept = state.optimizer.state.values()
        assert {value["step"].device.type for value in kept} == {place}
        assert {value["exp_avg"].device.type for value in kept} == {"cuda"}
        assert bool(state.optimizer.param_groups[0].get("fused")) == (place == "cuda")
        gpu.waits.clear()
        train_step(state, batch, targets, recipe, None)
    assert gpu.waits == []
    assert state.step == 2


def test_prediction_stays_on_the_gpu_and_waits_only_for_its_logits() -> None:
    recipe = tiny("predict.batch_size=4")
    model = trained_model(recipe, LABELS).eval()
    store = Silence(np.array([64, 100, 300]))
    with fake_gpu() as gpu:
        model.to("cuda")
        logits = predict_logits(model, store, recipe, GPU, recipe.views[0])
    assert logits.shape == (3, LABELS)
    windows = [max(1, -(-(int(n) - 64) // 32) + 1) for n in store.frames]
    assert len(gpu.waits) == -(-sum(windows) // 4)


def test_the_backward_pass_of_fake_tensors_gives_pytorchs_gradients() -> None:
    recipe = tiny(*EVERYTHING, "model.drop_rate=0")
    model, backward = trained_model(recipe, LABELS), Backward()
    (batch, _), gradients = fake_batch(recipe, 8, LABELS), []
    log_mels = torch.randn(8, 1, 32, 64, generator=torch.Generator().manual_seed(0))
    for own in (False, True):
        model.zero_grad()
        if own:
            with torch.autograd.graph.saved_tensors_hooks(backward.pack, backward.unpack):
                loss = (model(log_mels, torch.from_numpy(batch.noisy)) * torch.ones(LABELS)).square().mean()
            backward.run(loss)
        else:
            (model(log_mels, torch.from_numpy(batch.noisy)) * torch.ones(LABELS)).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_memory_of_a_step_is_freed_and_grows_evenly_with_the_batch() -> None:
    recipe = tiny(*EVERYTHING)
    model, (batch, targets) = trained_model(recipe, LABELS), fake_batch(recipe, 8, LABELS)
    lives = []
    with fake_gpu() as gpu:
        state = fake_state(recipe, model, torch.float16)
        for step in range(3):
            loss, norm = train_step(state, batch, targets, recipe, np.random.default_rng(step))
            del loss, norm
            lives.append(gpu.live)
    assert lives[0] == lives[1] == lives[2]
    own = 4 * sum(p.numel() for p in model.parameters())
    assert 4 * own <= lives[2] < 4 * own + 512 * 6 * len(model.state_dict())  # weights, average, two moments, and rounding
    at = {n: footprint(tiny(*EVERYTHING, f"train.batch_size={n}"), LABELS) for n in (16, 32, 64)}
    assert at[64].peak - at[32].peak == pytest.approx(2 * (at[32].peak - at[16].peak), rel=0.05)
    assert largest_batch(at[16], at[32], at[64].needed) == pytest.approx(64, abs=8)
    parts = footprint(tiny(*EVERYTHING, "train.batch_size=64"), LABELS, micro_batch=16)
    assert at[16].peak <= parts.peak < 0.6 * at[64].peak


def test_operations_are_three_times_those_of_the_forward_pass() -> None:
    recipe = tiny()
    model = trained_model(recipe, LABELS)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 32, 64))
    assert footprint(recipe, LABELS).flops == pytest.approx(3 * counter.get_total_flops(), rel=0.1)


def one_step(recipe: Recipe, targets: np.ndarray, log_mels: np.ndarray, rate: float = 0.5) -> list[torch.Tensor]:
    """The weights after one step of plain gradient descent on the CPU."""
    torch.manual_seed(0)
    state = TrainState(trained_model(recipe, LABELS), recipe.train, CPU)
    batch, _ = fake_batch(recipe, len(log_mels), LABELS)
    state.set_phase(recipe.train, rate)
    train_step(state, replace(batch, log_mels=log_mels), targets, recipe, np.random.default_rng(0))
    return [p.detach().clone() for p in state.trained]


@pytest.mark.parametrize("loss", ["bce", "focal", "lsep_bce"])
def test_parts_of_a_batch_give_the_gradient_of_the_whole_batch(loss: str) -> None:
    rng = np.random.default_rng(1)
    log_mels = rng.normal(-40, 10, (8, 64, 32)).astype(np.float16)
    targets = (rng.random((8, LABELS)) < 0.4).astype(np.float32)
    plain = ("train.optimizer=sgd", "train.clip_grad=0", "train.weight_decay=0")
    sets = (*EVERYTHING, "model.drop_rate=0", *plain, f"train.loss={loss}")
    before = one_step(tiny(*sets), targets, log_mels, 0.0)
    whole, parts = (one_step(tiny(*sets, f"train.micro_batch={n}"), targets, log_mels) for n in (0, 3))
    moved = [not torch.equal(a, b) for a, b in zip(before, whole, strict=True)]
    assert sum(moved) > len(moved) / 2
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_exact_sets_what_repeats_and_gives_back_what_was_set() -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    with exact(benchmark=True):
        assert cudnn.benchmark
        with exact():  # a validation within a training
            assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32) == (True, False, False)
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert cudnn.benchmark
    assert (cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()) == before


def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """Pretend that there are two GPUs. Returns: the states of their random generators."""
    states = {0: torch.tensor([1]), 1: torch.tensor([2])}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda index: states[int(getattr(index, "index", index))].clone())
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, index: states.__setitem__(int(getattr(index, "index", index)), state)
    )
    return states


def test_the_generators_of_all_gpus_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    states, before = two_gpus(monkeypatch), torch.get_rng_state()
    with repeatable(7, GPU):
        states[0] += 10
        states[1] += 10
        torch.rand(3)
    assert [states[0].item(), states[1].item()] == [1, 2]
    assert torch.equal(torch.get_rng_state(), before)
    with repeatable(7, CPU):
        first = torch.rand(3)
        states[0] += 10
    assert states[0].item() == 11, "a training on the CPU leaves the GPUs alone"
    with repeatable(7, CPU):
        assert torch.equal(torch.rand(3), first)


def test_a_device_is_looked_up_without_starting_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object) -> tuple[int, int]:
        raise AssertionError("this starts CUDA in the process that only hands out work")

    two_gpus(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", started)
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert find_device("auto").type == "cuda"
    for name in ("cuda:2", "mps", "gpu"):
        with pytest.raises(MelfoldError, match="device"):
            find_device(name)


def test_a_gpu_that_is_picked_has_repeatable_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    two_gpus(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(devices, "os", os)
    assert pick_device("cuda:0").precision == "fp16"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_lack_of_memory_is_one_line_with_the_way_out() -> None:
    with pytest.raises(MelfoldError) as caught, explain_out_of_memory(GPU, "Use --set train.micro_batch=32"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 14 GiB")
    (line,) = caught.value.lines
    assert line.startswith("cuda has not enough memory")
    assert "Tried to allocate 2.00 GiB" in line
    assert line.endswith("Use --set train.micro_batch=32")
