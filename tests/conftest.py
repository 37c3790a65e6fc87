"""One thread for all tests and the commands they start: with tiny models, more threads only wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
