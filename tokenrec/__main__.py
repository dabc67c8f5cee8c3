"""Run the command line: `python -m tokenrec VERB`."""

import sys

from tokenrec.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
