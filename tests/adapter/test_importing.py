"""What an import of the package leaves of the process's logging."""

import subprocess
import sys


def test_the_root_logger_stays_as_it_was():
    """A module of fairseq sets it to debugging, with which every plot fills a screen."""
    program = (
        "import logging, fairseq_sam, fairseq; root = logging.getLogger()\n"
        "print(root.level == logging.WARNING and not root.handlers)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
    assert "DEBUG" not in done.stderr
