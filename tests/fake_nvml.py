"""NVML without a GPU: two cards whose every answer can be changed or made to fail."""

import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """What NVML raises for everything."""


@dataclass
class Card:
    """One GPU: NVML's raw answers, in its own units. An answer that is an exception is raised."""

    bus: str = "0000:18:00.0"
    uuid: str = "GPU-aaaa-1"
    mig: int | Exception = 0
    energy_mj: int | Exception = 5_000
    power_mw: int | Exception = 300_000
    instant_mw: int | Exception = 350_000
    sm_mhz: int | Exception = 1_755
    memory_mhz: int | Exception = 2_619
    temperature: int | Exception = 45
    throttle: int | Exception = 0x1
    limit_mw: int | Exception = 700_000
    default_mw: int | Exception = 700_000
    pids: list[int] | Exception = field(default_factory=lambda: [os.getpid()])


class Nvml:
    """The functions of `pynvml` that are used; those of a newer driver are there only if `new` is set."""

    NVML_FI_DEV_POWER_INSTANT = 186

    def __init__(self, *cards: Card, new: bool = True) -> None:
        self.cards = list(cards)
        if new:
            self.nvmlDeviceGetCurrentClocksEventReasons = lambda card: _said(card.throttle)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> Card:
        for card in self.cards:
            if card.bus == bus:
                return card
        raise NVMLError("Not Found")

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        return [_said(card.mig), 0]

    def nvmlDeviceGetTotalEnergyConsumption(self, card: Card) -> Any:
        return _said(card.energy_mj)

    def nvmlDeviceGetPowerUsage(self, card: Card) -> Any:
        return _said(card.power_mw)

    def nvmlDeviceGetFieldValues(self, card: Card, _fields: list[int]) -> list[Any]:
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=_said(card.instant_mw)))]

    def nvmlDeviceGetClockInfo(self, card: Card, kind: int) -> Any:
        return _said({1: card.sm_mhz, 2: card.memory_mhz}[kind])

    def nvmlDeviceGetMaxClockInfo(self, _card: Card, kind: int) -> int:
        return {1: 1_980, 2: 2_619}[kind]

    def nvmlDeviceGetTemperature(self, card: Card, _sensor: int) -> Any:
        return _said(card.temperature)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: Card) -> Any:
        return _said(card.throttle)

    def nvmlDeviceGetEnforcedPowerLimit(self, card: Card) -> Any:
        return _said(card.limit_mw)

    def nvmlDeviceGetPowerManagementDefaultLimit(self, card: Card) -> Any:
        return _said(card.default_mw)

    def nvmlDeviceGetMemoryInfo(self, _card: Card) -> Any:
        return SimpleNamespace(used=3 * 2**30, total=80 * 2**30)

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in _said(card.pids)]

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13_000


def _said(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer
