"""Sources of logs, each in the columns that `tokenrec/data/source.py` describes.

`delimited.py` reads your own CSV or Parquet files. The others read public data sets:
`kuairand.py`, `complete_journey.py`, `amazon.py`; and `synthetic.py` generates a log.
Files with a source's name in front belong to it. `tabular.py` reads CSV and Parquet for
all of them, `download.py` and `archive.py` fetch and unpack.

docs/guides/adding_a_source.md shows how to add one.
"""
