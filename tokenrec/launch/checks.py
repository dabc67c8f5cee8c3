"""Check names and numbers that Kubernetes, Google Cloud or Slurm would refuse."""

from __future__ import annotations

import re

from tokenrec.errors import InputError

LABEL_LENGTH = 63
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_BUCKET = re.compile(r"[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]")
_IMAGE = re.compile(
    r"(?P<host>[a-z0-9.-]+(:\d+)?)(/[a-z0-9._-]+)+"
    r"(:(?P<tag>\w[\w.-]*)|@sha256:[0-9a-f]{64})"
)


def check_label(field: str, value: str, longest: int = LABEL_LENGTH) -> str:
    """Check a name for Kubernetes and the TPU VM service, and return it.

    Args:
      field: flag of the value, for the message.
      value: the name.
      longest: the most characters.

    Raises:
      InputError: they would refuse it.
    """
    if not _LABEL.fullmatch(value) or len(value) > longest:
        raise InputError(
            f"{field}='{value}' is refused by Kubernetes (RFC 1123): use small "
            "letters, digits and '-', begin with a letter, end with a letter or digit, "
            f"and use {longest} characters at most"
        )
    return value


def check_file_name(field: str, value: str) -> str:
    """Check a word that names a file and stands in a shell script, and return it.

    Args:
      field: flag of the value, for the message.
      value: the word.

    Raises:
      InputError: it has other characters than letters, digits, '-', '_' and '.'.
    """
    if not re.fullmatch(r"\w[-.\w]*", value, re.ASCII):
        raise InputError(
            f"{field}='{value}' is not a word of letters, digits, '-', '_' and '.'; "
            "begin it with a letter or digit"
        )
    return value


def check_image(
    image: str | None, dockerfile: str = "launch/Dockerfile", field: str = "image"
) -> str:
    """Check the name of a container image, and return it.

    Args:
      image: its name; None if it was not given.
      dockerfile: file that builds it, for the message.
      field: flag of the value, for the message.

    Raises:
      InputError: it is missing, or does not name one image for good.
    """
    if not image:
        raise InputError(
            f"{field} is not given; build {dockerfile}, push it, and give --{field} "
            "HOST/PATH/NAME:TAG"
        )
    match = _IMAGE.fullmatch(image)
    if not match or match["tag"] == "latest":
        raise InputError(
            f"{field}='{image}' is not HOST/PATH/NAME:TAG or @sha256:DIGEST with a tag "
            "other than latest: a restart must get the program that the run began with"
        )
    return image


def check_bucket(bucket: str | None) -> str:
    """Check the name of a Cloud Storage bucket, and return it.

    Raises:
      InputError: it is missing or malformed.
    """
    if not bucket:
        raise InputError(
            "bucket is not given; make one for data and runs, and give --bucket NAME "
            "(launch/README.md)"
        )
    if not _BUCKET.fullmatch(bucket):
        raise InputError(
            f"bucket='{bucket}' is not the name of a bucket; give the name alone, "
            "without gs:// or folder"
        )
    return bucket
