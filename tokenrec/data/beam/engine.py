"""Import Apache Beam (extra `beam`) when it is first needed, and choose its runner."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from tokenrec.data.source import LogPart
from tokenrec.errors import InputError

# Beam's runner in this process. The name "DirectRunner" would stand for a runner that
# may first try to fetch another one from the network.
LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


def beam_library() -> ModuleType:
    """Return the module `apache_beam`.

    Raises:
      InputError: it is not installed.
    """
    try:
        import apache_beam
    except ImportError as error:
        raise InputError(
            "--beam needs Apache Beam, which is not installed; make an environment of "
            "its own and run there, from the folder of the clone, "
            '`pip install ".[beam]" -c constraints-beam.txt`'
        ) from error
    return apache_beam


def tagged_output() -> Any:
    """Return Beam's `TaggedOutput`, which names the output that a value belongs to."""
    from apache_beam.pvalue import TaggedOutput

    return TaggedOutput


def pipeline_options(arguments: Sequence[str]) -> Any:
    """Make Beam's `PipelineOptions`; without a `--runner` it is the local one.

    Raises:
      InputError: Apache Beam is not installed.
    """
    beam_library()
    from apache_beam.options.pipeline_options import PipelineOptions

    has_runner = any(argument.partition("=")[0] == "--runner" for argument in arguments)
    default = () if has_runner else (f"--runner={LOCAL_RUNNER}",)
    return PipelineOptions([*arguments, *default])


def create_parts(pipeline: Any, parts: Sequence[LogPart], name: str) -> Any:
    """Make a collection of (number, part) from the parts of a source.

    Args:
      pipeline: Beam pipeline.
      parts: parts of the log or of the table of users.
      name: name of the parts in the labels of the pipeline's steps.
    """
    beam = beam_library()
    # Without the reshuffle Beam fuses this step with the next, and one worker would
    # read all parts.
    return (
        pipeline
        | f"{name} parts" >> beam.Create(list(enumerate(parts)))
        | f"Spread {name.lower()} parts" >> beam.Reshuffle()
    )
