"""What the lab's tests share."""

from collections.abc import Iterator

from tests.lab.making import FACTS
from zimage.lab import keys

import pytest


@pytest.fixture(scope="package", autouse=True)
def _known_device() -> Iterator[None]:
    """No test of the lab asks the real device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "device_facts", lambda _device="auto": FACTS)
        yield
