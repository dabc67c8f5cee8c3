"""Apache Beam (extra `beam`), imported when first needed, and the options that choose its runner."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from tokenrec.errors import InputError

# Beam's runner in this process. "DirectRunner" may first try to fetch another one from the net.
LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


def beam_library() -> ModuleType:
    """The module `apache_beam`.

    Raises:
      InputError: it is not installed.
    """
    try:
        import apache_beam
    except ImportError as error:
        raise InputError(
            "--beam needs Apache Beam, which is not installed; make an environment of its own and run there "
            "`pip install tokenrec[beam] -c constraints-beam.txt`"
        ) from error
    return apache_beam


def pipeline_options(arguments: Sequence[str]) -> Any:
    """Beam's `PipelineOptions`; without a `--runner` it is the local one.

    Raises:
      InputError: Apache Beam is not installed.
    """
    beam_library()
    from apache_beam.options.pipeline_options import PipelineOptions

    chosen = any(argument.partition("=")[0] == "--runner" for argument in arguments)
    return PipelineOptions(
        [*arguments, *(() if chosen else (f"--runner={LOCAL_RUNNER}",))]
    )
