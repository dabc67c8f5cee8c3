"""The train step as a compiled program per stream length, and the FLOPs it needs."""

from __future__ import annotations

import chex
import jax

from tokenrec.compiler_options import compiler_options, refusals_of
from tokenrec.data.batch import Batch
from tokenrec.data.pipeline import stream_lengths
from tokenrec.planner.flops import step_work
from tokenrec.planner.mfu import mfu, peak_flops
from tokenrec.run_setup import Setup
from tokenrec.state import TrainState
from tokenrec.step import Metrics, train_step


class JittedStep:
    """`train_step` of a run, compiled once for each stream length.

    Args:
      setup: the run.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        # A batch of another shape than those of the stream lengths would compile again
        # in silence; this raises instead. The counter is global over the runs of a
        # process.
        chex.clear_trace_counter()
        counted_step = chex.assert_max_traces(
            train_step, n=len(stream_lengths(setup.config.data))
        )
        # The old state is donated: the new one takes its memory.
        self._step = jax.jit(
            counted_step,
            static_argnums=0,
            donate_argnums=1,
            compiler_options=compiler_options(
                setup.mesh, setup.config.train.compiler_options
            ),
        )
        # FLOPs by the shape of the batch; a shape is here once its program is compiled.
        self._model_flops: dict[tuple[int, ...], float] = {}

    def is_compiled(self, batch: Batch) -> bool:
        """Whether the program for batches of this shape is compiled."""
        return batch.valid.shape in self._model_flops

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Dispatch a step whose program is compiled; returns before it is computed."""
        return self._step(self._setup.model, state, batch)

    def compile_and_run(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        """Compile the program for this shape and make the step; waits for the devices.

        Raises:
          InputError: the compiler refuses an option of `train.compiler_options`.
        """
        flops = self._count_flops(batch)
        with refusals_of(self._setup.config.train.compiler_options):
            outputs = jax.block_until_ready(self(state, batch))
        self._model_flops[batch.valid.shape] = flops
        return outputs

    def model_flops(self, batch: Batch) -> float:
        """FLOPs of a compiled step over all devices; 0 if the chip's peak is unknown."""
        return self._model_flops[batch.valid.shape]

    def utilisation(self, model_flops_per_second: float) -> float | None:
        """MFU at a rate of model FLOPs over all devices; None if the peak is unknown."""
        per_device = model_flops_per_second / self._setup.mesh.size
        return mfu(per_device, 1.0, self._device_kind)

    def _count_flops(self, batch: Batch) -> float:
        # Counting traces the step once more; without a peak nobody would use the count.
        if peak_flops(self._device_kind) is None:
            return 0.0
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        work, _ = step_work(self._setup.model, self._setup.mesh, shapes)
        return work.model_flops

    @property
    def _device_kind(self) -> str:
        return self._setup.mesh.devices.flat[0].device_kind
