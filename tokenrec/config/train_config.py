"""Config sections `optim`, `mesh` and `train`: the optimizer, the devices, the loop."""

# ml_collections reads the annotations as types: they must not be postponed.

import dataclasses
from typing import Literal

from tokenrec.config.fields import field
from tokenrec.config.model_config import DType


@dataclasses.dataclass
class OptimConfig:
    """AdamW for the dense weights, row-wise AdaGrad for the embedding tables."""

    steps: int = field(1000, at_least=1, special={0: "those of optim.epochs"})
    """Training steps, and the horizon of the schedule: linear warm-up, then a cosine to
    `final_fraction` of the peak. `train.stop_at` ends a run earlier on the same
    schedule. An override of it switches `epochs` off."""

    epochs: float = field(0.0, above=0, special={0: "off: optim.steps"})
    """Length of training in passes over the training samples, fractions included, in
    place of `steps`: give `steps=0` in a config file; an override of `epochs` sets it
    so. The steps are `epochs` times the batches of an epoch, rounded, and the run's
    config.json keeps both."""

    learning_rate: float = field(1e-3, above=0)
    """Peak learning rate of the dense weights. The first field to tune."""

    table_learning_rate: float = field(0.05, above=0)
    """Peak learning rate of the embedding tables. Item vectors of a sampled softmax
    want more, about 0.3."""

    table_rates: tuple[float, ...] = field((), at_least=0)
    """Factor of the learning rate of the tables in each epoch; the last one holds for
    all later epochs. (): 1 throughout. `1,0` trains the tables in the first epoch
    only, so that further epochs cannot memorise single ids. The factor multiplies the
    schedule, and with 0 `table_weight_decay` is off too."""

    warmup_steps: int = field(100, at_least=0)
    """Steps of linear warm-up of both learning rates."""

    final_fraction: float = field(0.0, at_least=0)
    """Learning rate at the last step, as a fraction of the peak."""

    weight_decay: float = field(0.01, at_least=0)
    """AdamW weight decay of weight matrices. Biases, norm scales and the bias of the
    gate are excluded."""

    table_weight_decay: float = field(0.0, at_least=0)
    """L2 weight decay of the table rows that a batch reads, per step and unit of the
    learning rate: a row shrinks by `rate * decay` of itself whenever it is read, and
    others do not change. AdaGrad's steps shrink with the gradients so far and the decay
    does not, so it wins in later epochs."""

    beta1: float = field(0.9, at_least=0, below=1)
    """AdamW decay of the mean gradient."""

    beta2: float = field(0.99, at_least=0, below=1)
    """AdamW decay of the mean squared gradient. 0.95 is usual for large models."""

    epsilon: float = field(1e-8, above=0)
    """AdamW denominator offset."""

    clip_norm: float = field(1.0, above=0, special={0: "no clipping"})
    """Largest norm of the gradient, over dense weights and table rows together, each
    table row counted once."""

    accumulate: int = field(1, at_least=1)
    """Micro-batches per step, among which `data.batch_size` is split. The result is
    that of the whole batch; raise it when activations do not fit. On a CPU a
    micro-batch is split further, to keep to the caches."""

    gradient_sums: DType = "float32"
    """Type of the gradients of the backbone's weight matrices until they are summed over
    devices. `bfloat16` halves that traffic and rounds every partial sum to 8 bits, also
    those of a weight that a step reads several times (`onetrans` with candidates). It
    needs `model.dtype="bfloat16"`. Moments and weights stay float32."""

    spike_norm: float = field(0.0, above=1, special={0: "off"})
    """Skip a step whose gradient norm is more than this many times its running mean.
    Steps with a loss or gradient that is not finite are always skipped."""

    max_skipped: int = field(0, at_least=0)
    """Skipped steps that a run tolerates; one more ends it with exit code 4."""


@dataclasses.dataclass
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices."""

    data: int = field(
        -1, at_least=1, special={-1: "all devices that the other axes leave"}
    )
    """Splits the batch. Weights are replicated along this axis, the only one that may
    reach across slices of a pod."""

    fsdp: int = field(1, at_least=1)
    """Splits the batch, and keeps each weight in shards that are gathered for use.
    Raise it when weights and optimizer state do not fit."""

    tensor: int = field(1, at_least=1)
    """Splits heads and feed-forward networks. Raise it when a single layer does not
    fit; it must divide `model.heads`."""

    context: int = field(1, at_least=1)
    """Splits the tokens of a stream inside the backbone. Raise it when the activations
    of one stream of very many events (`data.events`) do not fit."""


def mesh_fields(mesh: MeshConfig) -> str:
    """Write the sizes of the axes for a message; `context` only where it is set.

    >>> mesh_fields(MeshConfig(fsdp=3))
    'mesh.data=-1 mesh.fsdp=3 mesh.tensor=1'
    """
    axes = ("data", "fsdp", "tensor", *(("context",) if mesh.context != 1 else ()))
    return " ".join(f"mesh.{axis}={getattr(mesh, axis)}" for axis in axes)


@dataclasses.dataclass
class TrainConfig:
    """The training loop: evaluation, checkpoints, logs, early stopping, warm start."""

    stop_at: int = field(0, at_least=1, special={0: "optim.steps"})
    """Step after which training ends. It does not change the schedule."""

    eval_every: int = field(0, at_least=1, special={0: "at the end only"})
    """Steps between evaluations on `eval_split`."""

    eval_split: str = "valid"
    """Split that the loop evaluates; `valid` chooses the best checkpoint without
    looking at `test`. Empty trains without evaluation."""

    eval_samples: int = field(0, at_least=1, special={0: "all"})
    """Samples that an evaluation of the loop scores, spread evenly over the split.
    `tokenrec evaluate` scores all."""

    save_every: int = field(1_000, at_least=1, special={0: "at the end only"})
    """Steps between checkpoints. Every better evaluation saves one, too. A restart
    repeats at most this many steps."""

    keep: int = field(2, at_least=1)
    """Latest checkpoints that are kept, besides the best one."""

    keep_every: int = field(0, at_least=1, special={0: "none"})
    """Checkpoints at multiples of this many steps are kept forever."""

    log_every: int = field(20, at_least=1)
    """Steps between log lines. For a line the loop waits for the devices, as it does
    for an evaluation or a checkpoint, so small values slow short steps down."""

    log_states: bool = False
    """Each evaluation also logs the effective rank of the event states and the mean
    gate of every layer, to watch for collapse."""

    best_metric: Literal[
        "auto",
        "macro_auc",
        "macro_gauc",
        "loss",
        "request_ndcg",
        "recall@10",
        "ndcg@10",
    ] = "auto"
    """Metric that decides the best checkpoint and early stopping. Ranking: `macro_auc`,
    `macro_gauc`, `loss` (lower is better) or `request_ndcg` (with
    `data.request_ndcg`). Retrieval: `recall@10` or `ndcg@10`.
    `auto` is `macro_auc`, or `ndcg@10` for retrieval."""

    patience: int = field(0, at_least=1, special={0: "no early stopping"})
    """Evaluations without a better value after which training ends."""

    elastic: Literal["off", "accumulate", "scale"] = "off"
    """What a run does that comes back with other devices than `elastic_devices`. The
    samples of each step stay the same. `off`: nothing, so that with half of the devices
    each computes twice as many samples at a time. `accumulate`: it adds up more
    micro-batches, so that a device computes as many at a time as before; the results
    are those of before but for rounding. `scale`: it makes several updates in a step,
    each on a share of the batch, with rates scaled to it. The last two also fit the
    mesh: `mesh.fsdp` falls to its largest divisor that fits, `mesh.data` takes the
    rest."""

    elastic_devices: int = field(
        0, at_least=1, special={0: "those of the run's first start"}
    )
    """Devices that `data.batch_size` and `optim.accumulate` are meant for. Set it where
    the first start may already find fewer."""

    hang_seconds: float = field(1800.0, above=0, special={0: "never"})
    """Seconds without progress after which the watchdog ends the process with exit code
    5 and the stacks of all threads, for a scheduler to restart. A step, a batch of an
    evaluation, a save and the first compilation each count as progress; raise it if one
    of them takes longer."""

    keep_compiled: bool = True
    """Keep compiled programs in `WORKDIR/compiled`, so that a restart need not compile.
    The environment variable JAX_COMPILATION_CACHE_DIR names a folder for several
    runs."""

    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)
    """Options of XLA's compiler for the train step, by name, beside or in place of the
    defaults for the chip (tokenrec/compiler_options.py), such as
    `xla_tpu_scoped_vmem_limit_kib:65536`. An empty value leaves the option to the
    compiler. They may change the last digits of a run."""

    trackers: tuple[str, ...] = field((), choices=("wandb", "mlflow"))
    """Experiment trackers that also get the metrics: Weights & Biases, MLflow. Each
    needs the extra of its name."""

    profile_steps: int = field(0, at_least=1, special={0: "no profile"})
    """Steps to profile with `jax.profiler`, after the first ones, which compile. The
    trace is in `WORKDIR/profile`; TensorBoard and XProf open it."""

    warm_start: str = ""
    """Folder of another run whose weights a new run starts from: table rows by original
    id, dense weights by name. A run that has a checkpoint ignores it."""

    warm_start_checkpoint: str = "best"
    """Checkpoint of that run: best, latest or a step."""

    warm_start_data: str = ""
    """Data set of that run, if its folder has moved."""
