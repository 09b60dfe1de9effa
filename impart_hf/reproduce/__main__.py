"""`python -m impart_hf.reproduce`, the same as the command `impart-hf-reproduce`."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
