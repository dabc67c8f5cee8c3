"""Train and eval steps of the PyTorch peers, as a competent user would write them.

- AdamW, fused, on the dense weights; Adagrad on the tables: dense gradients for short
  tables, sparse ones for long tables (`torch_features.LONG`).
- Gradients of the dense weights and of the short tables are clipped by their joint norm.
- bfloat16 by autocast, with float32 weights.
- `torch.compile` of the whole model, or of its blocks one by one, which is the usual
  way for deep models: equal blocks share one program.

Importing this needs PyTorch.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch._dynamo
from torch import nn
from torch.nn import functional as F

from benchmarks.peers.torch_tokenformer import TorchTokenFormer
from tokenrec.config import OptimConfig
from tokenrec.data.batch import Batch
from tokenrec.errors import InputError

Compile = Literal["none", "blocks", "model"]


def to_torch(batch: Batch, device: str) -> dict[str, torch.Tensor]:
    """Move a batch to a device; every event must be real and every label known.

    Raises:
      InputError: there is padding, or an unknown label.
    """
    labels, weight = np.asarray(batch.labels), np.asarray(batch.weight)
    if not np.asarray(batch.valid).all() or not weight.all() or (labels < 0).any():
        raise InputError("the peers take batches without padding, every label known")
    parts = {
        "user": batch.user,
        "state": batch.state,
        "action": batch.action,
        "target": batch.target,
    }
    arrays = {"labels": labels.astype(np.float32)}
    for name, signals in parts.items():
        if signals is not None:
            arrays[f"{name}_ids"] = np.asarray(signals.ids).astype(np.int64)
            arrays[f"{name}_dense"] = np.asarray(signals.dense)
    return {name: torch.tensor(array).to(device) for name, array in arrays.items()}


def compile_model(model: nn.Module, how: Compile) -> Callable[..., torch.Tensor]:
    """Compile a model, or its blocks in place.

    Raises:
      InputError: the model has no blocks.
    """
    # The default, 8, is used up by a few kinds of layers in training and evaluation.
    torch._dynamo.config.recompile_limit = 64
    if how == "model":
        return torch.compile(model, dynamic=False)
    if how == "blocks":
        if not isinstance(model, TorchTokenFormer):
            raise InputError("this model has no blocks; compile the model")
        for block in model.blocks:
            block.compile(dynamic=False)
    return model


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each task, summed over the tasks."""
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return losses.mean(dim=(0, 1)).sum()


class Trainer:
    """A peer with its optimizers and batches on a device.

    Args:
      model: the peer, on its device.
      config: rates, betas and the clip norm.
      batches: batches that the steps go through in turn.
      how: what is compiled.
      bfloat16: compute in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        batches: Sequence[Batch],
        *,
        how: Compile = "none",
        bfloat16: bool = False,
    ):
        self.model = model
        self.forward = compile_model(model, how)
        parameters = dict(model.named_parameters())
        device = next(iter(parameters.values())).device.type
        self.batches = itertools.cycle([to_torch(batch, device) for batch in batches])
        self.autocast = lambda: (
            torch.autocast(device, torch.bfloat16)
            if bfloat16
            else contextlib.nullcontext()
        )
        tables = [w for name, w in parameters.items() if ".tables." in name]
        dense = [w for name, w in parameters.items() if ".tables." not in name]
        sparse = [
            w for name, w in parameters.items() if name.endswith("tables.long.weight")
        ]
        self.clipped = [
            w for w in parameters.values() if all(w is not s for s in sparse)
        ]
        self.clip_norm = config.clip_norm
        self.optimizers = [
            torch.optim.AdamW(
                dense,
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                eps=config.epsilon,
                weight_decay=config.weight_decay,
                fused=True,
            ),
            torch.optim.Adagrad(tables, lr=config.table_learning_rate, eps=1e-8),
        ]

    def train_step(self) -> torch.Tensor:
        """Make one update on the next batch; the loss stays on the device."""
        self.model.train()
        batch = next(self.batches)
        with self.autocast():
            loss = loss_of(self.forward(batch), batch["labels"])
        loss.backward()
        nn.utils.clip_grad_norm_(self.clipped, self.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def eval_step(self) -> torch.Tensor:
        """Compute the probabilities of the next batch."""
        self.model.eval()
        with torch.no_grad(), self.autocast():
            return torch.sigmoid(self.forward(next(self.batches)))


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers in the dense weights and in the tables."""
    counts = {"dense": 0, "tables": 0}
    for name, weight in model.named_parameters():
        counts["tables" if ".tables." in name else "dense"] += weight.numel()
    return counts
