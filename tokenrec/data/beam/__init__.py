"""Prepare a log on Apache Beam, when one machine would take too long (docs/guides/beam.md).

`prepare.py` is the driver and lists the other files; read it first.
"""
