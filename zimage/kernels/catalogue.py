"""All kernels by name."""

from zimage.kernels.flash import FLASH_ATTENTION
from zimage.kernels.gate import SWIGLU
from zimage.kernels.heads import QK_NORM_ROPE
from zimage.kernels.native import Kernel
from zimage.kernels.packed import DEQUANTIZE
from zimage.kernels.stream import RESIDUAL_NORM_MODULATE

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (QK_NORM_ROPE, FLASH_ATTENTION, RESIDUAL_NORM_MODULATE, SWIGLU, DEQUANTIZE)
}
