"""`python -m neuronet_jax`: the same as the console script `neuronet`."""

import sys

from neuronet_jax.cli import main

sys.exit(main())
