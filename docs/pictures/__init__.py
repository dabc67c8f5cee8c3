"""The pictures of the documentation, drawn as SVG: `python -m docs.pictures`."""
