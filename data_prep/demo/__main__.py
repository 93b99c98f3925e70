"""Runs `python -m data_prep.demo`."""

import sys

from data_prep.demo.cohort import main

sys.exit(main())
