"""`python -m r1q` is `r1q`."""

from r1q.cli import start

start()
