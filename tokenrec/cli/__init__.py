"""Command line: `tokenrec VERB`."""
