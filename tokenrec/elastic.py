"""Fit a run to the devices that it finds: its mesh, and the parts of a step.

A run that comes back with fewer devices keeps its steps: the batch of a step has the same
`data.batch_size` samples, in the same order, and the schedules, evaluations and
checkpoints count the same steps. So no sample is lost or read twice, whatever the
devices. What changes is how the batch of a step is computed, by `train.elastic`:

    off         as the config says; a device gets more samples at a time
    accumulate  more micro-batches, whose gradients are added up for one update
    scale       several updates, each on a share of the batch, at scaled rates (optim.py)

The last two let a device compute no more samples at a time than on the devices that the
run began with, its *full* devices. D devices of a full number F, B samples a step, M
micro-batches of an update, k updates of a step:

    accumulate  k = 1,                             M the least that is at least A F / D
    scale       k the least that is at least F/D,  M the least that is at least A F / (D k)

where A is `optim.accumulate`, k and M are at least 1, and k M divides the samples of a
device. More devices than the full ones take fewer micro-batches, down to one; the batch
never grows. This module imports no JAX.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import NamedTuple

from tokenrec.config import Config, MeshConfig
from tokenrec.errors import InputError


class StepSplit(NamedTuple):
    """How the batch of a step is split.

    Attributes:
      accumulate: micro-batches of an update, M.
      updates: updates of a step, k; 1 but for `train.elastic="scale"`.
    """

    accumulate: int
    updates: int = 1


def fit_axes(config: Config, devices: int) -> MeshConfig:
    """Fit the axes of an elastic run's mesh to a number of devices.

    `fsdp` becomes the largest of its divisors that fits, because weights may lie in
    larger shards; `data` takes the devices that are left. The other axes stay: they
    split single layers and streams, which may not fit otherwise.

    Args:
      config: the run's config.
      devices: number of devices.

    Returns:
      Axes that multiply to `devices`; those of the config with `train.elastic="off"`.

    Raises:
      InputError: the other axes do not divide the devices.

    >>> from tokenrec.config import TrainConfig
    >>> elastic = Config(mesh=MeshConfig(fsdp=8), train=TrainConfig(elastic="scale"))
    >>> fitted = fit_axes(elastic, 4)
    >>> fitted.data, fitted.fsdp
    (1, 4)
    """
    mesh, elastic = config.mesh, config.train.elastic
    if elastic == "off":
        return mesh
    sizes: dict[str, int] = dataclasses.asdict(mesh)
    fixed = {axis: n for axis, n in sizes.items() if axis not in ("data", "fsdp")}
    product = math.prod(fixed.values())
    if devices % product:
        given = " ".join(f"mesh.{axis}={n}" for axis, n in fixed.items() if n > 1)
        raise InputError(
            f"{given} does not divide the {devices} devices that the run finds, and "
            f"train.elastic='{elastic}' does not change it, because a layer or a stream "
            f"may not fit in memory otherwise; give the run a multiple of {product} "
            "devices, or lower it"
        )
    fsdp = math.gcd(mesh.fsdp, devices // product)
    return dataclasses.replace(mesh, data=devices // (product * fsdp), fsdp=fsdp)


def full_devices(config: Config, devices: int, first: int | None) -> int:
    """Devices that the batch size and the micro-batches of a run are meant for.

    Args:
      config: the run's config.
      devices: devices of this start.
      first: devices of the first start of the run; None if they are not known.
    """
    return config.train.elastic_devices or first or devices


def split_step(
    config: Config, *, devices: int, shards: int, full: int, updates: int | None = None
) -> StepSplit:
    """Split the batch of a step for the devices of a mesh.

    Args:
      config: the run's config.
      devices: devices of the mesh, D.
      shards: devices of the mesh that share a batch, see `sharding.batch_shards`.
      full: see `full_devices`, F.
      updates: k, to repeat a step that was made on other devices; None decides.

    Raises:
      InputError: the devices cannot share the batch of a step.

    >>> from tokenrec.config import TrainConfig
    >>> elastic = Config(train=TrainConfig(elastic="scale"))
    >>> elastic.data.batch_size = 64
    >>> split_step(elastic, devices=4, shards=4, full=16)
    StepSplit(accumulate=1, updates=4)
    """
    accumulate, elastic = config.optim.accumulate, config.train.elastic
    if elastic == "off" and updates is None:
        return StepSplit(accumulate)
    size = config.data.batch_size
    if size % shards:
        _raise_not_shared(config, shards, full)
    own = size // shards
    ratio = Fraction(full, devices)
    if updates is None:
        updates = _least_divisor(own, ratio) if elastic == "scale" else 1
    elif own % updates:
        _raise_not_shared(config, shards * updates, full)
    if elastic == "off":
        return StepSplit(accumulate, updates)
    return StepSplit(
        _least_divisor(own // updates, accumulate * ratio / updates), updates
    )


def with_split(config: Config, split: StepSplit) -> Config:
    """The config that a model computes with: `optim.accumulate` is that of the split."""
    if split.accumulate == config.optim.accumulate:
        return config
    optim = dataclasses.replace(config.optim, accumulate=split.accumulate)
    return dataclasses.replace(config, optim=optim)


def _least_divisor(number: int, least: Fraction) -> int:
    """Smallest divisor of `number` that is at least `least`; `number` if none is."""
    return next((n for n in range(1, number) if number % n == 0 and n >= least), number)


def _raise_not_shared(config: Config, shards: int, full: int) -> None:
    size = config.data.batch_size
    usable = [n for n in range(1, max(full, shards) + 1) if size % n == 0]
    raise InputError(
        f"data.batch_size={size} is not a multiple of the {shards} devices that share a "
        f"batch (train.elastic='{config.train.elastic}'), and the samples of a step stay "
        "those of the run; start it on as many devices that share a batch as one of "
        f"{usable}"
    )
