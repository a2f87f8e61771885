"""A GPU for the kernels' sources: they are compiled by g++ with CUDA's or Metal's names, and run by fibers on a CPU.

The function around a body is written as MLX 0.32 writes it: which shapes and strides it takes, in which order, and how
templates come in. It does not tell how fast a kernel is, nor whether nvcc and Apple's compiler take it; what a kernel
has in PTX is replaced by functions that do the same (`hopper.h`).
"""

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage.kernels.flash import PTX
from zimage.kernels.native import Kernel, Launch
from zimage.kernels.preludes import PRELUDES

import mlx.core as mx
import numpy as np

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
FLAGS = [
    "-std=c++20", "-O1", "-fsanitize=alignment,bounds,shift", "-fno-sanitize-recover=all", "-Wno-unknown-pragmas",
    "-Wno-attributes", f"-I{HERE}",
]  # fmt: skip
TYPES = {
    "cuda": {mx.float32: "float", mx.bfloat16: "__nv_bfloat16", mx.float16: "__half"},
    "metal": {mx.float32: "float", mx.bfloat16: "bfloat16_t", mx.float16: "float16_t"},
}
ITEM = {mx.float32: "<f4", mx.bfloat16: "<u2", mx.float16: "<f2", mx.uint32: "<u4", mx.int32: "<i4", mx.uint8: "u1"}


@dataclass(frozen=True)
class Slice:
    """How an input lies in a larger array: others' values before and after each row, and between its own.

    turned: axes 1 and 2 are exchanged there.
    """

    before: int = 8
    after: int = 16
    step: int = 1
    turned: bool = False


NO_SLICES: Mapping[int, Slice] = {}


class Device:
    """Compiles into `folder`, once for each variant, and runs there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, here: str, kernel: Kernel, launch: Launch, slices: Mapping[int, Slice] = NO_SLICES) -> list[mx.array]:
        """What the kernel writes. Inputs whose numbers are in `slices` lie in larger arrays, with other strides."""
        program = self._program(here, kernel, launch)
        data = bytearray()
        for number, array in enumerate(launch.inputs):
            values, strides, offset = _laid_out(array, slices.get(number))
            data += np.array([len(values), offset * array.dtype.size], "<i8").tobytes()
            data += np.array([*array.shape, *[0] * (8 - array.ndim)], "<i4").tobytes()
            data += np.array([*strides, *[0] * (8 - array.ndim)], "<i8").tobytes() + values
        sizes = [int(np.prod(s)) * d.size for s, d in zip(launch.shapes, launch.dtypes, strict=True)]
        x, y, z = (-(-t // g) for t, g in zip(launch.threads, launch.group, strict=True))
        assert z == 1 and launch.group[1:] == (1, 1) and launch.group[0] % 32 == 0
        assert all(t % g == 0 for t, g in zip(launch.threads, launch.group, strict=True))
        command = [str(program), *map(str, (x, y, launch.group[0], *sizes))]
        done = subprocess.run(command, input=bytes(data), capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, f"the kernel ended with {done.returncode}: {done.stderr.decode()}"
        found, at = [], 0
        for shape, dtype, size in zip(launch.shapes, launch.dtypes, sizes, strict=True):
            values = np.frombuffer(done.stdout[at : at + size], ITEM[dtype]).reshape(shape)
            found.append(mx.array(values).view(dtype) if dtype == mx.bfloat16 else mx.array(values))
            at += size
        return found

    def _program(self, here: str, kernel: Kernel, launch: Launch) -> Path:
        source = write(here, kernel, launch)
        program = self.folder / f"{kernel.name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}"
        if not program.exists():
            program.with_suffix(".cpp").write_text(source)
            header = self.folder / f"{here}.h.gch"  # found beside the source; half of the time is for the names
            if not header.exists():
                _compile("-x", "c++-header", str(HERE / f"{here}.h"), "-o", str(header))
            _compile(str(program.with_suffix(".cpp")), "-o", str(program))
        return program


def _compile(*arguments: str) -> None:
    done = subprocess.run([str(COMPILER), *FLAGS, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def write(here: str, kernel: Kernel, launch: Launch) -> str:
    """The program: the kernel's function, and a main that reads its inputs and writes its outputs."""
    types = {**TYPES[here], mx.uint32: "uint32_t", mx.int32: "int", mx.uint8: "uint8_t"}
    source = kernel.source(here)
    parameters, arguments = [], []
    for number, (name, array) in enumerate(zip(kernel.inputs, launch.inputs, strict=True)):
        parameters.append(f"const {types[array.dtype]}* {name}")
        arguments.append(f"(const {types[array.dtype]}*)inputs[{number}].at()")
        for what, kind in (("shape", "int32_t"), ("strides", "int64_t")):
            if f"{name}_{what}" in source:
                parameters.append(f"const {kind}* {name}_{what}")
                arguments.append(f"inputs[{number}].{what}")
        if f"{name}_ndim" in source:
            parameters.append(f"int {name}_ndim")
            arguments.append(str(array.ndim))
    for number, (name, dtype) in enumerate(zip(kernel.outputs, launch.dtypes, strict=True)):
        parameters.append(f"{types[dtype]}* {name}")
        arguments.append(f"({types[dtype]}*)outputs[{number}].data")
    constants = "".join(_constant(name, value, types) for name, value in launch.template)
    header = kernel.header.replace(PTX, '#include "hopper.h"')
    return f"""#include "{here}.h"
{PRELUDES[here]}{header}
namespace mlx {{
void function({", ".join(parameters)}) {{
{constants}{source}
}}
}}
{_main(", ".join(arguments), len(kernel.inputs), kernel.shared_bytes)}
"""


def _main(arguments: str, inputs: int, shared_bytes: int) -> str:
    main = _MAIN.replace("ARGUMENTS", arguments).replace("INPUTS", str(inputs))
    return main.replace("SHARED_BYTES", str(shared_bytes))


def _constant(name: str, value: Any, types: dict[mx.Dtype, str]) -> str:
    if isinstance(value, mx.Dtype):
        return f"  using {name} = {types[value]};\n"
    return f"  constexpr int {name} = {value};\n"


def _laid_out(array: mx.array, part: Slice | None) -> tuple[bytes, list[int], int]:
    """An array's bytes, its strides and where it begins, in items."""
    wide = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    values = np.ascontiguousarray(np.array(wide).astype(ITEM[array.dtype]))
    if part is None:
        return values.tobytes(), [s // values.itemsize for s in values.strides], 0
    values = values.swapaxes(1, 2) if part.turned else values
    end = part.before + part.step * values.shape[-1]
    room = np.full((*values.shape[:-1], end + part.after), 7, values.dtype)
    room[..., part.before : end : part.step] = values
    strides = [s // values.itemsize for s in room.strides]
    strides[-1] *= part.step
    if part.turned:
        strides[1], strides[2] = strides[2], strides[1]
    return room.tobytes(), strides, part.before


_MAIN = """
struct Input {
  int64_t bytes, offset;
  int32_t shape[8];
  int64_t strides[8];
  emulation::Buffer* buffer;
  const char* at() const { return buffer->data + offset; }
};

static void read_all(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(5);
}

int main(int count, char** argument) {
  std::vector<Input> inputs(INPUTS);
  for (Input& input : inputs) {
    read_all(&input.bytes, 8);
    read_all(&input.offset, 8);
    read_all(input.shape, sizeof input.shape);
    read_all(input.strides, sizeof input.strides);
    input.buffer = new emulation::Buffer(input.bytes);
    read_all(input.buffer->data, input.bytes);
  }
  std::vector<emulation::Buffer> outputs;
  for (int i = 4; i < count; ++i) {
    outputs.emplace_back(std::strtoull(argument[i], nullptr, 10));
  }
  emulation::shared_bytes = SHARED_BYTES;
  emulation::body = [&] { mlx::function(ARGUMENTS); };
  const unsigned across = std::atoi(argument[1]), down = std::atoi(argument[2]);
  emulation::groups = {across, down, 1};
  for (unsigned y = 0; y < down; ++y) {
    for (unsigned x = 0; x < across; ++x) {
      emulation::group = {x, y, 0};
      emulation::run_group(std::atoi(argument[3]));
    }
  }
  for (const emulation::Buffer& output : outputs) {
    if (!output.intact()) {
      std::fprintf(stderr, "it wrote beside its output\\n");
      return 6;
    }
    std::fwrite(output.data, 1, output.bytes, stdout);
  }
  return 0;
}
"""
