"""Frequencies of rotary positions of language models, with the changes for long texts.

    theta_i = base^(-2 i / h)                              i in [0, h / 2)
    linear    theta_i / factor                             Gemma 3, full layers
    llama3    theta_i            where the wavelength 2 pi / theta_i < c / high
              theta_i / factor   where it is > c / low
              between: (1 - m) theta_i / factor + m theta_i,
              m = (c theta_i / (2 pi) - low) / (high - low)

c is the length of the texts before the change (`model.decoder.rope_context`). llama3: as
published with the Llama 3.1 weights (arXiv 2407.21783, section 3.4.2, names the longer
context; the formula is that of the released model).

h: width of a head.
"""

from __future__ import annotations

import numpy as np

from tokenrec.config import ModelConfig


def frequencies(head_width: int, base: float) -> np.ndarray:
    """Compute theta, `[h / 2] float64`."""
    return base ** (-np.arange(0, head_width, 2) / head_width)


def global_frequencies(config: ModelConfig) -> np.ndarray:
    """Frequencies of the full layers of a language model, `[h / 2] float32`."""
    decoder = config.decoder
    theta = frequencies(decoder.head_width, config.rope_base)
    if decoder.rope_scaling == "linear":
        theta = theta / decoder.rope_factor
    elif decoder.rope_scaling == "llama3":
        low, high = decoder.rope_low, decoder.rope_high
        turns = decoder.rope_context * theta / (2 * np.pi)
        # 0 for long wavelengths, 1 for short ones.
        mix = np.clip((turns - low) / (high - low), 0, 1)
        theta = (1 - mix) * theta / decoder.rope_factor + mix * theta
    return theta.astype(np.float32)


def local_frequencies(config: ModelConfig) -> np.ndarray:
    """Frequencies of the layers that have a window of their own, `[h / 2] float32`."""
    decoder = config.decoder
    base = decoder.local_rope_base or config.rope_base
    return frequencies(decoder.head_width, base).astype(np.float32)
