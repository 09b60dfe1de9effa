"""`python -m impart_hf.cli`, as `accelerate launch -m impart_hf.cli` runs it."""

import sys

from .main import main

sys.exit(main())
