"""When a kernel runs: only after it gave the right answers on this device; else its composed form, and one warning."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.synthetic import synthetic
from tests.test_trust import FACTS
from zimage import backend, blas, half, trust
from zimage.config import TransformerConfig
from zimage.kernels import native
from zimage.kernels.flash import FLASH_ATTENTION
from zimage.kernels.gate import SWIGLU
from zimage.kernels.heads import QK_NORM_ROPE
from zimage.kernels.native import Kernel, Launch, normal
from zimage.kernels.stream import RESIDUAL_NORM_MODULATE
from zimage.layers import clone
from zimage.transforms import blocks

import mlx.core as mx
import pytest

Run = Callable[[mx.array], list[mx.array]]
REQUEST: trust.Request = {"dtype": "float32"}
KEY = trust.key({**REQUEST, "kernel": "double"})


def _prepare(_most: int, x: mx.array) -> Launch | None:
    return Launch([x], [], (32, 1, 1), (32, 1, 1), [x.shape], [x.dtype]) if x.ndim == 2 else None


def _examples(request: trust.Request) -> Iterator[tuple[mx.array]]:
    for seed in (0, 1):
        yield (normal(seed, 3, 4).astype(getattr(mx, request["dtype"])),)


class Gpu:
    """A GPU whose kernel does what a test says, and counts how often it is started; its trials all pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.run: Run = lambda x: [x * 2]
        self.calls = 0
        self.trials: list[trust.Request] = []
        self.verdict = ""
        monkeypatch.setattr(native, "platform", lambda: "cuda")
        monkeypatch.setattr(mx.fast, "cuda_kernel", self.create)
        monkeypatch.setattr(backend, "device_facts", lambda: FACTS)
        monkeypatch.setattr(blas, "cache_folder", lambda: folder)
        monkeypatch.setattr(trust, "tried", self._tried)

    def create(self, **_about: Any) -> Callable[..., list[mx.array]]:
        def started(inputs: list[mx.array], **_launch: Any) -> list[mx.array]:
            self.calls += 1
            return self.run(inputs[0])

        return started

    def _tried(self, requests: list[trust.Request], _timeout_s: float) -> dict[str, str]:
        self.trials += requests
        return {trust.key(request): self.verdict for request in requests}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    native.forget()
    yield Gpu(monkeypatch, tmp_path)
    native.forget()


@pytest.fixture
def double() -> Kernel:
    return Kernel("double", lambda x: x + x, ("x",), ("y",), "", _prepare, _examples)


def refused(double: Kernel, reason: str) -> None:
    """Installing warns once with the reason, then the composed form answers in silence."""
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        assert not double.install(REQUEST)
    assert len(caught) == 1
    assert "the kernel double is not used, its plain form is" in str(caught[0].message)
    answers_right(double)
    assert not double.install(REQUEST)


def answers_right(double: Kernel, dtype: mx.Dtype = mx.float32) -> None:
    x = normal(5, 3, 4).astype(dtype)
    assert mx.array_equal(double(x), x + x)


def test_a_right_kernel_runs(gpu: Gpu, double: Kernel) -> None:
    """After its trial and the check in place, calls start the kernel; its verdict is kept."""
    assert double.install(REQUEST)
    before = gpu.calls
    assert before == 4  # two examples, each twice
    answers_right(double)
    assert gpu.calls == before + 1
    assert [request["kernel"] for request in gpu.trials] == ["double"]
    assert trust.kept(FACTS) == {KEY: ""}
    assert double.install(REQUEST)
    assert (gpu.calls, len(gpu.trials)) == (before + 1, 1)  # once a process


def test_a_kept_verdict_needs_no_trial(gpu: Gpu, double: Kernel) -> None:
    """The next process tries nothing again, but checks in place."""
    trust.keep(FACTS, {KEY: ""})
    assert double.install(REQUEST)
    assert (gpu.calls, gpu.trials) == (4, [])


def test_a_kernel_that_fails_its_trial_never_starts_here(gpu: Gpu, double: Kernel) -> None:
    """A crash elsewhere is not repeated in this process."""
    gpu.verdict = "its trial was ended by signal 11"
    refused(double, "signal 11")
    assert gpu.calls == 0


def _raises(_x: mx.array) -> list[mx.array]:
    raise RuntimeError("first line\nno such symbol")


class _Changing:
    """Right at first, another bit at each further call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: mx.array) -> list[mx.array]:
        self.calls += 1
        return [x * (2 + self.calls * 2e-7)]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x: [x * 2.01], "it is wrong by 0.0"),
        (lambda x: [x * mx.nan], "it is wrong by inf"),
        (lambda x: [mx.where(x > 1, mx.inf, 2 * x)], "it is wrong by inf"),
        (lambda x: [mx.zeros_like(x)], "it is wrong by"),
        (lambda x: [x[:1] * 2], r"it gives .*float32 \(1, 4\) instead of .*float32 \(3, 4\)"),
        (lambda x: [(x * 2).astype(mx.float16)], "it gives .*float16"),
        (lambda x: [x * 2, x], "it gives 2 arrays instead of 1"),
        (_raises, "no such symbol"),
        (_Changing(), "it gives other bits when it runs again"),
    ],
)
def test_a_wrong_kernel_is_refused_in_place(run: Run, reason: str, gpu: Gpu, double: Kernel) -> None:
    """Wrong or changing values, NaN, other shapes and errors: one warning, the composed form, a lasting verdict."""
    gpu.run = run
    refused(double, reason)
    assert trust.kept(FACTS)[KEY]
    native.forget()  # in the next process
    gpu.trials.clear()
    refused(double, reason)
    assert gpu.trials == []


def test_a_backend_that_makes_no_kernel(gpu: Gpu, double: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error at its creation, as MLX raises without CUDA, is a verdict like another."""

    def missing(**_about: Any) -> Any:
        raise RuntimeError("[cuda_kernel] No CUDA back-end.")

    monkeypatch.setattr(mx.fast, "cuda_kernel", missing)
    refused(double, "No CUDA back-end")
    assert gpu.calls == 0


def test_a_kernel_that_fails_later_falls_back(gpu: Gpu, double: Kernel) -> None:
    """An error at a call of a trusted kernel gives the composed answer and one warning, and ends the trust."""
    assert double.install(REQUEST)
    gpu.run = _raises
    with pytest.warns(RuntimeWarning, match="no such symbol") as caught:
        answers_right(double)
    assert len(caught) == 1
    before = gpu.calls
    answers_right(double)
    assert gpu.calls == before


def test_what_was_not_checked_does_not_run(gpu: Gpu, double: Kernel) -> None:
    """Another dtype than the one checked gets the composed form, with one warning; the checked one still runs."""
    assert double.install(REQUEST)
    before = gpu.calls
    with pytest.warns(RuntimeWarning, match="not checked for .*bfloat16 at these sizes; apply its transform last"):
        answers_right(double, mx.bfloat16)
    answers_right(double, mx.bfloat16)
    assert gpu.calls == before
    answers_right(double)
    assert gpu.calls == before + 1


def test_what_a_call_met_unchecked_can_be_installed(gpu: Gpu, double: Kernel) -> None:
    """A call without a verdict bars nothing: installed for that dtype, the kernel is checked, and then runs."""
    assert double.install(REQUEST)
    with pytest.warns(RuntimeWarning, match="not checked for"):
        answers_right(double, mx.bfloat16)
    assert double.install(REQUEST | {"dtype": "bfloat16"})
    before = gpu.calls
    answers_right(double, mx.bfloat16)
    assert gpu.calls == before + 1


def test_measuring_a_model_starts_none_of_its_kernels(gpu: Gpu) -> None:
    """How far a fast model's values reach is computed by plain operations, and no kernel is asked for fp32."""
    plain = synthetic(TransformerConfig.tiny())
    model = clone(plain)
    for _, block in blocks(model):
        block.feed_forward.swiglu, block.residual_norm_modulate = SWIGLU, RESIDUAL_NORM_MODULATE
        block.attention.norm_then_rotate = QK_NORM_ROPE
    latents = mx.random.normal((1, plain.config.in_channels, 4, 4), key=mx.random.key(1))
    example = (latents, mx.array([0.5]), mx.ones((1, 3, plain.config.cap_feat_dim)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, (velocity,) = half.measure(model, [example])
    assert gpu.calls == 0 and found.keys() == half.measure(plain, [example])[0].keys()
    assert half.relative_l2(velocity, plain(*example)) < 1e-5


def test_arguments_that_only_the_composed_form_takes(gpu: Gpu, double: Kernel) -> None:
    """They are no failure: no warning, and the kernel is trusted as before."""
    assert double.install(REQUEST)
    before = gpu.calls
    assert mx.array_equal(double(mx.ones((2, 3, 4))), 2 * mx.ones((2, 3, 4)))
    assert gpu.calls == before
    answers_right(double)
    assert gpu.calls == before + 1


def test_an_example_that_suits_no_kernel_is_refused(gpu: Gpu, double: Kernel) -> None:
    """A kernel is not installed for sizes it does not take."""
    unsuited = replace(double, prepare=lambda _most, _x: None)
    with pytest.warns(RuntimeWarning, match='it does not take these sizes, {"dtype": "float32"}'):
        assert not unsuited.install(REQUEST)
    assert unsuited.verify(REQUEST) == "its own example does not suit it"
    assert gpu.calls == 0


def test_a_cpu_runs_the_composed_form(double: Kernel) -> None:
    """Nothing is checked, started or said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not double.install(REQUEST)
        answers_right(double)


def test_a_kernel_for_another_architecture(gpu: Gpu, double: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """There it is neither tried nor started, and nothing is said; on its own it runs as others do."""
    monkeypatch.setattr(native, "architecture", lambda: "sm_100")
    elsewhere, here = (replace(double, architecture=name) for name in (trust.HOPPER, "sm_100"))
    assert elsewhere.verify(REQUEST) == "it is not written for this device"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not elsewhere.install(REQUEST)
        answers_right(elsewhere)
    assert (gpu.calls, gpu.trials) == (0, [])
    assert here.verify(REQUEST) == "" and here.install(REQUEST)
    before = gpu.calls
    answers_right(here)
    assert gpu.calls == before + 1


def test_a_kernel_may_be_off_by_more_roundings(gpu: Gpu, double: Kernel) -> None:
    """What two roundings explain, and one does not, is refused but where the kernel says two."""
    off = 1.5 * native.BOUNDS["float32"]
    gpu.run = lambda x: [2 * x + off * mx.sqrt(mx.mean((2 * x) ** 2))]
    assert "it is wrong by" in double.verify(REQUEST)
    assert replace(double, roundings=2).verify(REQUEST) == ""


def test_a_cuda_kernel_has_a_header_and_memory_to_share(double: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX gets the kernel's own header after the prelude and how many bytes it shares, and of others neither."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **about: made.append(about))
    native.forget()
    double._made("cuda")
    replace(double, name="other", header="// own", shared_bytes=64)._made("cuda")
    native.forget()
    assert "shared_memory" not in made[0] and made[1]["shared_memory"] == 64
    assert made[1]["header"] == made[0]["header"] + "// own"


@pytest.mark.parametrize("value", ["off", "OFF", "0"])
def test_the_user_can_turn_all_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZIMAGE_KERNELS=off is as a device without kernels."""
    monkeypatch.setattr(native.mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    assert native.platform() == "metal"  # no CUDA here
    monkeypatch.setenv(trust.VARIABLE, value)
    assert native.platform() is None


def test_a_word_that_nobody_knows_turns_all_off_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; a CPU has no kernels to turn off, and hears nothing."""
    monkeypatch.setenv(trust.VARIABLE, "offf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.platform() is None
    monkeypatch.setattr(native.mx, "default_device", lambda: mx.Device(mx.gpu))
    with pytest.warns(RuntimeWarning, match="ZIMAGE_KERNELS='offf' is not known"):
        assert native.platform() is None


@pytest.mark.parametrize(
    ("q", "k", "scale"),
    [
        ((1, 4, 3, 128), (1, 4, 2, 128), 1.0),
        ((2, 4, 2, 128), (1, 4, 2, 128), 1.0),
        ((1, 4, 2, 128), (1, 4, 2, 64), 1.0),
        ((1, 4, 2, 64), (1, 4, 2, 64), 1.0),
        ((1, 4, 2, 128), (1, 0, 2, 128), 1.0),
        ((1, 0, 2, 128), (1, 4, 2, 128), 1.0),
        ((1, 4, 2, 128), (1, 4, 2, 128), 0.0),
        ((1, 4, 2, 128), (1, 4, 2, 128), -1.0),
        ((2, 1, 2**15, 128), (2, 1, 1, 128), 1.0),
        ((1, 1, 1, 128), (1, 2**20, 1, 128), 1.0),
    ],
)
def test_attention_that_is_not_for_the_kernel(q: tuple[int, ...], k: tuple[int, ...], scale: float) -> None:
    """Heads that do not fit, other batches, no tokens, a scale that turns the order, and too many rows are left."""
    prepare = FLASH_ATTENTION.prepare
    arrays = [mx.zeros(shape, mx.bfloat16) for shape in (q, k, k)]
    assert prepare(512, *arrays, scale) is None
    one = mx.zeros((1, 4, 2, 128), mx.bfloat16)
    assert prepare(512, one, one, one, 1.0) is not None
