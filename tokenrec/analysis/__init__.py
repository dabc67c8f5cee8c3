"""Measure trained models from the inside, and report the results of studies.

`rank.py`, `information.py`, `event_states.py`, `attention_maps.py` and
`signal_probe.py` measure one trained run (docs/methods.md section 5). `study_files.py`,
`summary.py` and `report.py` turn the tables of a study into one HTML page.
"""
