"""Kernels of our own: when one runs natively, and when its plain composed form does.

A kernel is one body of source for CUDA and Metal between preludes that say how each spells what the body needs. It runs
only where it has been installed and found right on this device; otherwise, and on a CPU always, its composed form does.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from zimage import backend, blas, trust
from zimage.kernels.preludes import PRELUDES, STARTS

import mlx.core as mx
import numpy as np

Arguments = tuple[Any, ...]
Variant = tuple[Any, ...]
SIMD = 32
MOST_THREADS = {"cuda": 512, "metal": 256}
# Largest error beside the composed form in fp32, as a share of the value and of the root mean square of all values: two
# roundings to the dtype, and in fp32 the sums' order.
BOUNDS = {"float32": 2e-5, "bfloat16": 2.0**-7, "float16": 2.0**-10}
AGAINST_COMPOSED = 4  # times the bound: the composed form rounds after every operation


@dataclass(frozen=True)
class Launch:
    """What a kernel is started with. threads: in the grid; group: of one thread group, which divides the grid.

    template: also the dtypes of the inputs, for MLX tells compiled kernels apart by this alone.
    """

    inputs: list[mx.array]
    template: list[tuple[str, Any]]
    threads: tuple[int, int, int]
    group: tuple[int, int, int]
    shapes: list[tuple[int, ...]]
    dtypes: list[mx.Dtype]

    @property
    def variant(self) -> Variant:
        """What is compiled for it; sequence lengths have no part in it."""
        return (*self.template, *[a.dtype for a in self.inputs], *self.dtypes)


@dataclass(frozen=True)
class Kernel:
    """One kernel beside its composed form; calling it runs one of the two.

    composed: MLX operations, taking the kernel's arguments and giving an array or a tuple of them.
    prepare: what to start for these arguments with at most so many threads a group, or None for arguments that only
    the composed form takes.
    examples: arguments to try the kernel with, for a request, in the request's dtype.
    strided: whether the body reads strides; otherwise MLX copies inputs that are not contiguous.
    header: what stands before the function, after the prelude; shared_bytes: of memory that a group shares, beside what
    the body declares. Both are CUDA's.
    roundings: how often `BOUNDS` its result may be off, for one that rounds more than it must.
    architecture: of the devices that it is written for, as MLX names it, or "" for all. Elsewhere its composed form is
    all there is, and nothing is said of it.
    """

    name: str
    composed: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    prepare: Callable[..., Launch | None]
    examples: Callable[[trust.Request], Iterator[Arguments]]
    strided: bool = True
    header: str = ""
    shared_bytes: int = 0
    roundings: int = 1
    architecture: str = ""

    def __call__(self, *arguments: Any) -> Any:
        """What `composed` gives, computed natively where that is trusted."""
        here = self.platform()
        launch = None if here is None else self.prepare(MOST_THREADS[here], *arguments)
        if here is None or launch is None:
            return self.composed(*arguments)
        variant = self.name, launch.variant
        if variant not in _verdicts and variant not in _unchecked:
            _unchecked.add(variant)  # no verdict, or it could not be installed any more
            self._warn(f"it is not checked for {launch.dtypes[0]} at these sizes; apply its transform last")
        if _verdicts.get(variant, "not checked"):
            return self.composed(*arguments)
        try:
            return self.start(here, launch)
        except Exception as error:  # whatever a backend raises, the composed form still answers
            self._refuse([launch], blas.one_line(error) or type(error).__name__)
            return self.composed(*arguments)

    def platform(self) -> Literal["cuda", "metal"] | None:
        """Whose compiler the kernel is for here; None where its composed form is all there is."""
        here = platform()
        return here if here is None or self.architecture in ("", architecture()) else None

    def start(self, here: str, launch: Launch) -> Any:
        """The native form's result, trusted or not, not yet computed."""
        found = self._made(here)(
            inputs=launch.inputs,
            template=launch.template,
            grid=launch.threads,
            threadgroup=launch.group,
            output_shapes=launch.shapes,
            output_dtypes=launch.dtypes,
        )
        return found[0] if len(found) == 1 else tuple(found)

    def source(self, here: str) -> str:
        """The body as `here`'s compiler takes it."""
        return STARTS[here] + self.body

    def _made(self, here: str) -> Any:
        """MLX's kernel, made at its first use: MLX refuses to make one without its backend."""
        if (self.name, here) not in _made:
            create: Any = mx.fast.cuda_kernel if here == "cuda" else mx.fast.metal_kernel
            more = {"shared_memory": self.shared_bytes} if self.shared_bytes else {}
            _made[self.name, here] = create(
                name=f"zimage_{self.name}",
                input_names=list(self.inputs),
                output_names=list(self.outputs),
                source=self.source(here),
                header=PRELUDES[here] + self.header,
                ensure_row_contiguous=not self.strided,
                **more,
            )
        return _made[self.name, here]

    def install(self, request: trust.Request) -> bool:
        """Check the kernel for a request on this device, once a process, and say whether it will run natively.

        In a process of its own first, unless a verdict is kept, then here. Where it fails, one warning says why, and
        the composed form is used from then on. On a CPU there is nothing to check.
        """
        here = self.platform()
        if here is None:
            return False
        wanted = request | {"kernel": self.name}
        prepared = (self.prepare(MOST_THREADS[here], *example) for example in self.examples(wanted))
        launches = [launch for launch in prepared if launch is not None]
        if not launches:
            self._refuse([], f"it does not take these sizes, {trust.key(request)}")
            return False
        if not all((self.name, launch.variant) in _verdicts for launch in launches):
            facts, name = backend.device_facts(), trust.key(wanted)
            reason = trust.settle(facts, [wanted])[name]
            if not reason:
                reason = self.verify(wanted)
                trust.keep(facts, {name: reason})
            if reason:
                self._refuse(launches, reason)
            else:
                _verdicts.update({(self.name, launch.variant): "" for launch in launches})
        return not any(_verdicts[self.name, launch.variant] for launch in launches)

    def verify(self, request: trust.Request) -> str:
        """Why the native form must not be used for a request, "" where it gives the right answers here."""
        try:
            here = self.platform()
            if here is None:
                return "there is no GPU to run it on" if platform() is None else "it is not written for this device"
            for example in self.examples(request):
                launch = self.prepare(MOST_THREADS[here], *example)
                if launch is None:
                    return "its own example does not suit it"
                # Before the right answers are in memory, where a kernel that writes nothing might find them.
                found = [_as_list(self.start(here, launch)) for _ in range(2)]
                mx.eval(found)
                for one in found:
                    problem = compare(one, self.composed, example, self.roundings)
                    if problem:
                        return problem
                wanted = _as_list(self.composed(*example))
                if not all(w is None or _same_bits(a, b) for a, b, w in zip(*found, wanted, strict=True)):
                    return "it gives other bits when it runs again"
        except Exception as error:  # a compiler's message, a refused launch: all of it means the composed form
            return blas.one_line(error) or type(error).__name__
        return ""

    def _refuse(self, launches: Sequence[Launch], reason: str) -> None:
        """Use the composed form for such launches from now on, and say so once."""
        _verdicts.update({(self.name, launch.variant): reason for launch in launches})
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        warnings.warn(
            f"the kernel {self.name} is not used, its plain form is: {reason} (see zimage doctor)",
            RuntimeWarning,
            stacklevel=3,
        )


# Kernels and variants this process has checked: why one is refused, "" where it is trusted.
_verdicts: dict[tuple[str, Variant], str] = {}
_unchecked: set[tuple[str, Variant]] = set()  # those that a call met without a verdict, which was said
_made: dict[tuple[str, str], Any] = {}  # MLX's kernels by name and platform


def forget() -> None:
    """Trust no kernel any more, as in a new process."""
    _verdicts.clear()
    _unchecked.clear()
    _made.clear()


def platform() -> Literal["cuda", "metal"] | None:
    """Whose kernels can run on MLX's default device; None on a CPU, or where the user turned them off."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    if trust.off():
        if doubt := trust.doubt():
            warnings.warn(doubt, RuntimeWarning, stacklevel=1)  # of one place, so that it is told once
        return None
    return "cuda" if _has_cuda() else "metal"


@cache
def _has_cuda() -> bool:
    return bool(mx.cuda.is_available())


@cache
def architecture() -> str:
    """The GPU's architecture as MLX names it, such as "sm_90" for NVIDIA's Hopper."""
    return str(mx.device_info().get("architecture", ""))


def dtype_name(dtype: mx.Dtype) -> str:
    """A dtype in one word, such as "bfloat16"."""
    return str(dtype).removeprefix("mlx.core.")


def float_bits(value: float) -> int:
    """A number as the integer of the same bits: templates take no fractions, and what they hold costs no load."""
    return int(np.float32(value).view(np.int32))


def whole_groups(threads: int, most: int) -> int:
    """A thread group's size for so many threads: whole SIMD groups, at most `most`."""
    return min(-(-threads // SIMD) * SIMD, most)


def normal(seed: int, *shape: int) -> mx.array:
    """Seeded random values for examples, in fp32."""
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def compare(found: Any, composed: Callable[..., Any], arguments: Arguments, roundings: int = 1) -> str:
    """Why results are not those of `composed`, "" where they are. Where `composed` gives None, anything may be.

    They must be within so many `BOUNDS` of the composed form in fp32, and within four times that of the composed form
    itself.
    """
    alike = _as_list(composed(*arguments))
    exact = _as_list(composed(*(_wide(a) for a in arguments)))
    found = _as_list(found)
    if len(found) != len(alike):
        return f"it gives {len(found)} arrays instead of {len(alike)}"
    for one, near, true in zip(found, alike, exact, strict=True):
        if near is None:
            continue
        if one.shape != near.shape or one.dtype != near.dtype:
            return f"it gives {one.dtype} {one.shape} instead of {near.dtype} {near.shape}"
        bound = roundings * BOUNDS[dtype_name(one.dtype)]
        for wanted, allowed in ((true, bound), (near, AGAINST_COMPOSED * bound)):
            error = _error(one, wanted)
            if not error <= allowed:
                return f"it is wrong by {error:.2g} of its values, more than {allowed:.2g}"
    return ""


def _error(found: mx.array, wanted: mx.array) -> float:
    """The largest difference as a share of the value and the root mean square of all; infinite for what isn't finite"""
    a, b = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (found, wanted))
    if not np.isfinite(a).all():
        return float("inf")
    scale = np.abs(b) + np.sqrt(np.mean(b**2)) + np.finfo(np.float32).tiny
    return float(np.max(np.abs(a - b) / scale, initial=0.0))


def _wide(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(_wide(one) for one in argument)
    if isinstance(argument, mx.array):
        return argument.astype(mx.float32) if mx.issubdtype(argument.dtype, mx.floating) else argument
    return mx.float32 if isinstance(argument, mx.Dtype) else argument


def _as_list(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _same_bits(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b, equal_nan=True))
