"""Run `impart-hf` as a module: `python -m impart_hf.cli`, or `accelerate launch -m impart_hf.cli`."""

import sys

from .main import main

sys.exit(main())
