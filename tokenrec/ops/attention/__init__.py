"""Attention: one entry point and its implementations."""

from tokenrec.ops.attention.api import (
    IMPLEMENTATIONS,
    PREFERRED,
    Choice,
    Implementation,
    attention,
    choose,
)
from tokenrec.ops.attention.pattern import ATTENTION_RESULT, Pattern

__all__ = [
    "ATTENTION_RESULT",
    "IMPLEMENTATIONS",
    "PREFERRED",
    "Choice",
    "Implementation",
    "Pattern",
    "attention",
    "choose",
]
