"""The kernels' own sources, in CUDA's and Metal's spelling, run on this CPU: they give what their composed forms give."""

from tests.emulation.device import COMPILER, Device
from zimage import trust
from zimage.kernels.catalogue import KERNELS
from zimage.kernels.native import MOST_THREADS, compare

import pytest

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ here to compile the kernels' sources with")
REQUESTS: list[trust.Request] = [
    {"kernel": "qk_norm_rope", "head_dim": 128},
    {"kernel": "qk_norm_rope", "head_dim": 16},
    {"kernel": "qk_norm_rope", "head_dim": 256},
    {"kernel": "residual_norm_modulate", "width": 3840},
    {"kernel": "residual_norm_modulate", "width": 72},
    {"kernel": "residual_norm_modulate", "width": 6152},
    {"kernel": "swiglu"},
    {"kernel": "dequantize", "bits": 4, "group_size": 64},
    {"kernel": "dequantize", "bits": 8, "group_size": 32},
    {"kernel": "dequantize", "bits": 4, "group_size": 128},
]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Device:
    return Device(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("here", ["cuda", "metal"])
@pytest.mark.parametrize("request_", REQUESTS, ids=trust.key)
def test_a_kernel_gives_what_its_composed_form_gives(
    request_: trust.Request, here: str, dtype: str, gpu: Device
) -> None:
    """On its own examples every kernel passes the check that it must pass on the user's device."""
    kernel = KERNELS[request_["kernel"]]
    for example in kernel.examples({**request_, "dtype": dtype}):
        launch = kernel.prepare(MOST_THREADS[here], *example)
        assert launch is not None
        assert compare(gpu.run(here, kernel, launch), kernel.composed, example) == ""
