"""Write Kubernetes manifests as YAML."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml


def to_yaml(manifests: Iterable[dict[str, Any]]) -> str:
    """Write manifests as YAML for `kubectl apply`, in the order of their fields."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=1_000)


class _Dumper(yaml.SafeDumper):
    """YAML writer that keeps text of several lines readable, and repeats no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Dumper.add_representer(str, _represent_text)
