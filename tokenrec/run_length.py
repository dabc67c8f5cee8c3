"""Turn `optim.epochs` into steps, by the count of the input pipeline itself.

An epoch has the batches that `data.pipeline.steps_per_epoch` counts: whole batches of
`data.batch_size` samples over all devices, after samples were cut, dealt to buckets and
windows, and the rest of each window dropped. Micro-batches, devices and processes do
not enter. `epochs` times that number, rounded to a whole step, takes the place of
`optim.steps`, and everything after it reads `optim.steps` alone: schedules, the loop,
checkpoints. The config.json of the run keeps both numbers, so that the steps stay the
same for as long as the run does.
"""

from __future__ import annotations

import dataclasses

from tokenrec.config import Config
from tokenrec.config.validate import validate
from tokenrec.data.pipeline import steps_per_epoch
from tokenrec.data.windows import LogReader
from tokenrec.errors import InputError


def with_steps(config: Config, dataset: LogReader, *, epoch_steps: int = 0) -> Config:
    """Set `optim.steps` of a config whose length is given in epochs.

    Args:
      config: a validated config.
      dataset: the prepared data set, without the excluded features.
      epoch_steps: steps of an epoch, if they have been counted; 0 counts them.

    Returns:
      A config with steps; the given one if `optim.epochs` is off.

    Raises:
      InputError: the config has steps too, and they are others; other fields do not go
        with the steps; or the data set has no batch.
    """
    optim = config.optim
    if not optim.epochs:
        return config
    # Counting the samples of a large data set takes a while.
    epoch_steps = epoch_steps or steps_per_epoch(dataset, config.data)
    steps = steps_of(optim.epochs, epoch_steps)
    if optim.steps not in (0, steps):
        raise InputError(
            f"optim.epochs={optim.epochs:g} is {steps} steps of this data set, "
            f"{epoch_steps} an epoch, and optim.steps={optim.steps} says otherwise; set "
            "optim.steps=0 to follow the data, or optim.epochs=0 to keep the steps"
        )
    return validate(
        dataclasses.replace(config, optim=dataclasses.replace(optim, steps=steps))
    )


def steps_of(epochs: float, epoch_steps: int) -> int:
    """Steps of some epochs, rounded; at least one.

    >>> steps_of(2, 26), steps_of(0.1, 30), steps_of(0.01, 26)
    (52, 3, 1)
    """
    return max(round(epochs * epoch_steps), 1)
