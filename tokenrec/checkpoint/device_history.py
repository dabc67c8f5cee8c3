"""Keep the devices that a run has used, from which step on: `WORKDIR/devices.json`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tokenrec.config.types import has_type
from tokenrec.errors import InputError
from tokenrec.runtime.files import is_file, read_json, write_json

DEVICES_FILE = "devices.json"
_REMEDY = (
    "delete it, and set train.elastic_devices to the devices that the run began with"
)


@dataclasses.dataclass(frozen=True)
class DeviceUse:
    """How a run computes its steps from some step on.

    Attributes:
      devices: devices of all processes.
      processes: number of processes.
      mesh: size of each axis of the mesh.
      elastic: `train.elastic`.
      accumulate: micro-batches of an update.
      updates: updates of a step.
      step: the first step that is computed like this.
    """

    devices: int
    processes: int
    mesh: dict[str, int]
    elastic: str
    accumulate: int
    updates: int
    step: int = 0

    def same_as(self, other: DeviceUse) -> bool:
        """Whether steps are computed in the same way, from whichever step on."""
        return self == dataclasses.replace(other, step=self.step)

    def as_origin(self) -> dict[str, Any]:
        """JSON value that is stored with a checkpoint, whose step says the step."""
        value = dataclasses.asdict(self)
        del value["step"]
        return value

    def describe(self) -> str:
        """Put devices and processes into words, with the axes that split anything.

        >>> DeviceUse(8, 1, {"data": 4, "fsdp": 2, "tensor": 1}, "off", 1, 1).describe()
        '8 devices in 1 process (data 4, fsdp 2)'
        """
        split = {name: size for name, size in self.mesh.items() if size > 1}
        axes = ", ".join(f"{name} {size}" for name, size in split.items()) or "no split"
        processes = "process" if self.processes == 1 else "processes"
        devices = "device" if self.devices == 1 else "devices"
        return f"{self.devices} {devices} in {self.processes} {processes} ({axes})"

    def describe_change(self, before: DeviceUse) -> str:
        """Put into words what changed from another use of devices to this one."""
        return (
            f"step {self.step:,}: {self.describe()}, and before {before.describe()}; "
            f"train.elastic='{self.elastic}': micro-batches of an update "
            f"{before.accumulate} -> {self.accumulate}, updates of a step "
            f"{before.updates} -> {self.updates}"
        )

    def numbers(self) -> dict[str, int]:
        """Numbers for the log of metrics."""
        return self.mesh | {
            "devices": self.devices,
            "processes": self.processes,
            "accumulate": self.accumulate,
            "updates": self.updates,
        }


@dataclasses.dataclass(frozen=True)
class DeviceHistory:
    """What `devices.json` holds.

    Attributes:
      first_devices: devices of the first start, which need not have made a step.
      uses: in the order of their steps.
    """

    first_devices: int
    uses: tuple[DeviceUse, ...]

    def at(self, step: int) -> DeviceUse | None:
        """How a step was computed; None before the first step that is known."""
        return next((use for use in reversed(self.uses) if use.step <= step), None)


def read_history(workdir: Path) -> DeviceHistory | None:
    """Read which devices a run has used.

    Returns:
      The history; None for a new run, or one from before it was kept.

    Raises:
      InputError: the file is damaged.
    """
    path = workdir / DEVICES_FILE
    if not is_file(path):
        return None
    value = read_json(path, "the run's", _REMEDY)
    try:
        return _parse(value)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the run's '{path}' is damaged; {_REMEDY}") from error


def record_use(workdir: Path, use: DeviceUse) -> DeviceUse | None:
    """Note how the steps from `use.step` on are computed; in the first process only.

    Returns:
      How the run computed its steps before, if it did so differently.
    """
    history = read_history(workdir) or DeviceHistory(use.devices, ())
    before = history.uses[-1] if history.uses else None
    # What was noted for later steps is forgotten with them: they are made again.
    kept = tuple(known for known in history.uses if known.step < use.step)
    if not kept or not kept[-1].same_as(use):
        kept = (*kept, use)
    if kept != history.uses:
        uses = [dataclasses.asdict(known) for known in kept]
        value = {"first_devices": history.first_devices, "uses": uses}
        write_json(workdir / DEVICES_FILE, value)
    return before if before is not None and not before.same_as(use) else None


def _parse(value: Any) -> DeviceHistory:
    uses = tuple(DeviceUse(**use) for use in value["uses"])
    first = value["first_devices"]
    for use in uses:
        numbers = [use.devices, use.processes, use.accumulate, use.updates]
        if not has_type(use.mesh, dict[str, int]) or not _are_counts(numbers):
            raise ValueError(use)
        if type(use.step) is not int or type(use.elastic) is not str:
            raise ValueError(use)
    if not _are_counts([first]):
        raise ValueError(first)
    return DeviceHistory(first, uses)


def _are_counts(values: list[Any]) -> bool:
    return all(type(value) is int and value > 0 for value in values)
