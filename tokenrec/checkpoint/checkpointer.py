"""Saving and restoring a run: the only file that knows Orbax.

A checkpoint is (step, state, progress); `progress` is what the loop knows besides. The step is the position in the data
too, so that any number of processes may go on. All processes take part. The config and the versions of the packages
are kept beside each.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from tokenrec.checkpoint.integrity import SET_ASIDE, find_damage, quarantine, write_sums
from tokenrec.errors import InputError
from tokenrec.runtime import distributed
from tokenrec.runtime.versions import versions
from tokenrec.state import TrainState

FOLDER = "checkpoints"
_PUT_BY = "unassessed-"
_LISTED = 8
_LEFT_OUT = "..."
_SHORT = 1 << 16  # bytes


@dataclasses.dataclass(frozen=True)
class Progress:
    """State of the training loop besides weights and optimizer.

    Attributes:
      best: value of the best evaluation, higher is better; None before the first.
      best_step: step of that evaluation; -1 before the first.
      waited: evaluations since the best one, for `train.patience`.
      skipped: steps whose update was not made.
      assessed: False if a signal stopped the run before the evaluation that was due at
        this step; a resumed run then repeats it.
      step: updates made. A checkpoint does not repeat it: its folder is named by it.
    """

    best: float | None = None
    best_step: int = -1
    waited: int = 0
    skipped: int = 0
    assessed: bool = True
    step: int = 0

    def after_evaluation(self, value: float | None) -> Progress:
        """Progress after an evaluation of this step; `value` is None if undefined."""
        if value is not None and (self.best is None or value > self.best):
            return dataclasses.replace(
                self, best=value, best_step=self.step, waited=0, assessed=True
            )
        return dataclasses.replace(self, waited=self.waited + 1, assessed=True)

    def to_json(self) -> dict[str, Any]:
        """JSON value kept beside a checkpoint."""
        values = dataclasses.asdict(self)
        del values["step"]
        return values


class CheckpointReader:
    """The checkpoints of a run, opened to be read. A context manager: leaving it ends what is under way."""

    def __init__(self, workdir: Path) -> None:
        self._folder = Path(workdir).absolute() / FOLDER
        self._orbax = self._open()

    def _open(self) -> Any:
        return ocp.training.Checkpointer(self._folder)

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._orbax.close()

    @property
    def steps(self) -> list[int]:
        return _steps(self._folder)

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluated checkpoint, the earliest of equals; None if none was evaluated."""
        try:
            evaluated = [
                (_value(c.metrics), -c.step)
                for c in self._orbax.checkpoints
                if c.metrics
            ]
        except ValueError as error:
            raise InputError(
                f"'{self._folder}': the metrics of a checkpoint cannot be read ({error}); name a step with "
                "--checkpoint, or go on training, which sets damaged checkpoints aside"
            ) from error
        return -max(evaluated)[1] if evaluated else None

    def load_state(self, which: str, abstract: TrainState) -> tuple[int, TrainState]:
        """The state of checkpoint "best", "latest" or a step number; "best" is the latest if none was evaluated.

        A leaf of `abstract` that is `...` is not read, and comes back as it is.

        Raises:
          InputError: no such checkpoint, it is damaged, or holds another state.
        """
        with distributed.raise_on_all_processes():
            step = self._choose(which)
        step = distributed.broadcast_from_first(
            step
        )  # a run that goes on may save in between
        damage = _damage(self._folder / str(step))
        if damage:
            others = [one for one in self.steps if one != step]
            raise InputError(
                f"checkpoint {step} in '{self._folder}' is damaged: {damage}; use another one of {others}, or "
                "train again from the one before"
            )
        return step, self._load(step, abstract)

    def _choose(self, which: str) -> int:
        steps = self.steps
        if not steps:
            raise InputError(
                f"'{self._folder}' holds no checkpoint; train first, or check --workdir"
            )
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self.best_step
            return steps[-1] if best is None else best
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise InputError(
            f"checkpoint '{which}' is not there; use best, latest, or one of {steps}"
        )

    def _load(self, step: int, abstract: TrainState) -> TrainState:
        with distributed.raise_on_all_processes():
            self._check_shapes(step, abstract)
        return self._orbax.load_checkpointables(step, {"state": abstract})["state"]

    def _check_shapes(self, step: int, abstract: TrainState) -> None:
        found = self._orbax.checkpointables_metadata(step).metadata
        here, there = (
            _shapes(abstract),
            _shapes(None if found is None else found.get("state")),
        )
        wanted = [
            name
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != _LEFT_OUT
        ]
        differing = [name for name in wanted if here.get(name) != there.get(name)]
        if differing:
            listed = "".join(
                f"\n  {name}: {there.get(name, 'nothing')} in the checkpoint, {here.get(name, 'nothing')} in this model"
                for name in differing[:_LISTED]
            )
            more = (
                f"\n  and {len(differing) - _LISTED} others"
                if len(differing) > _LISTED
                else ""
            )
            raise InputError(
                f"checkpoint {step} in '{self._folder}' holds another state; use the version of tokenrec that wrote "
                f"it, or start a new --workdir:{listed}{more}"
            )


class Checkpointer(CheckpointReader):
    """The checkpoints of a run that goes on. The latest `keep`, every one at a multiple of `keep_every` steps, and the
    best stay.

    Args:
      about: what is written beside each checkpoint, a JSON value; its config.
    """

    def __init__(
        self, workdir: Path, *, keep: int, keep_every: int = 0, about: Any = None
    ) -> None:
        policies = ocp.training.preservation_policies
        kept: list[Any] = [
            policies.LatestN(keep),
            policies.BestN(
                get_metric_fn=_value, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self._policy = policies.AnyPreservationPolicy(kept)
        self._about = {"config": about, "versions": versions()}
        self._sealing: _Sealing | None = None
        folder = Path(workdir).absolute() / FOLDER
        self._bring_back(folder)
        self._set_damaged_aside(folder)
        super().__init__(workdir)

    def _open(self) -> Any:
        # Folders of saves that a kill cut short go away.
        return ocp.training.Checkpointer(
            self._folder, preservation_policy=self._policy, cleanup_tmp_directories=True
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except InputError as failed:
            if error is None:
                raise
            print(
                f"tokenrec: {failed}", file=sys.stderr
            )  # what ended the loop is told by its own error
        finally:
            try:
                self._orbax.close()
            except Exception as failed:
                if self._sealing is None or self._sealing.error is None:
                    raise failed

    def save(
        self, step: int, state: TrainState, progress: Progress, value: float | None
    ) -> None:
        """Starts to save in the background; `value` is the evaluation of this step, if it had one.

        Raises:
          InputError: the save before could not be written.
        """
        self.wait()
        if step in self.steps:
            if value is None:
                return
            self._put_by(step)
        metrics = None if value is None else {"value": value}
        self._guard(
            step,
            lambda: self._orbax.save_checkpointables_async(
                step,
                {"state": state},
                force=True,
                metrics=metrics,
                custom_metadata={"progress": progress.to_json()} | self._about,
            ),
        )

    def wait(self) -> None:
        """Until the save under way is whole on the disk.

        Raises:
          InputError: it could not be written.
        """
        if self._sealing is None:
            return
        self._sealing.join()
        if self._sealing.error is not None:
            self._fail(self._sealing.step, self._sealing.error)
        self._sealing = None
        if distributed.is_first_process():
            for folder in self._folder.glob(_PUT_BY + "*"):
                shutil.rmtree(folder)

    def restore(self, abstract: TrainState) -> tuple[int, TrainState, Progress] | None:
        """The latest checkpoint, laid out as `abstract`; None if there is none."""
        step = distributed.broadcast_from_first(self.steps[-1] if self.steps else -1)
        if step < 0:
            return None
        state = self._load(step, abstract)
        kept = self._orbax.checkpointables_metadata(step).custom_metadata
        return step, state, Progress(**kept["progress"])

    def _guard(self, step: int, start: Callable[[], Any]) -> None:
        try:
            response = start()
        except (OSError, ValueError, RuntimeError) as error:
            self._fail(step, error)
        self._sealing = _Sealing(step, response, self._folder / str(step))

    def _fail(self, step: int, error: BaseException) -> None:
        reason = str(error).strip().partition("\n")[0][:300]
        whole = [known for known in self.steps if known != step]
        raise InputError(
            f"checkpoint {step} cannot be written to '{self._folder}': {reason}; make room or give access, and start "
            f"again: checkpoints {whole} are whole"
        ) from error

    def _put_by(self, step: int) -> None:
        """Renames a checkpoint that was saved before its evaluation, until the one that knows it is whole."""
        if distributed.is_first_process():
            (self._folder / str(step)).rename(self._folder / f"{_PUT_BY}{step}")
        distributed.broadcast_from_first(0)
        self._orbax.reload()

    def _bring_back(self, folder: Path) -> None:
        if distributed.is_first_process():
            for path in folder.glob(_PUT_BY + "*"):
                named = folder / path.name.removeprefix(_PUT_BY)
                if named.exists():
                    shutil.rmtree(path)
                else:
                    path.rename(named)
        distributed.broadcast_from_first(0)

    def _set_damaged_aside(self, folder: Path) -> None:
        """All files of the latest that is whole are checked; of those before it the short ones, which are read too."""
        whole, damaged = None, 0
        for step in reversed(_steps(folder)):
            damage = _damage(folder / str(step), math.inf if whole is None else _SHORT)
            if not damage:
                whole = step if whole is None else whole
                continue
            damaged += 1
            if distributed.is_first_process():
                to = quarantine(folder / str(step))
                print(
                    f"tokenrec: checkpoint {step} is damaged: {damage}; set aside as '{to}'",
                    file=sys.stderr,
                )
        distributed.broadcast_from_first(
            0
        )  # nobody looks before the folders are renamed
        if damaged and whole is None:
            raise InputError(
                f"'{folder}' holds no whole checkpoint: {damaged} damaged ones were set aside as {SET_ASIDE}STEP; "
                "restore them from a copy, or start a new --workdir"
            )


class _Sealing(threading.Thread):
    """Waits for a save, and writes the sums of its files."""

    def __init__(self, step: int, response: Any, folder: Path) -> None:
        super().__init__(name=f"seal checkpoint {step}", daemon=True)
        self.step = step
        self._response, self._of = response, folder
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._response.result()
            write_sums(self._of, jax.process_index(), jax.process_count())
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits
            self.error = error


def _damage(folder: Path, largest: float = math.inf) -> str:
    """What is wrong with a checkpoint, "" for nothing; each process reads its share."""
    found = find_damage(folder, jax.process_index(), jax.process_count(), largest)
    told = [
        text for text in distributed.gather_from_all("; ".join(found[:_LISTED])) if text
    ]
    return "; ".join(told)


def _steps(folder: Path) -> list[int]:
    return sorted(
        int(path.name)
        for path in folder.glob("*")
        if path.name.isdecimal() and path.is_dir()
    )


def _shapes(tree: Any) -> dict[str, str]:
    """Shape and type of each array by its path."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _LEFT_OUT
        if leaf is ...
        else f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _value(metrics: Any) -> float:
    return metrics["value"]
