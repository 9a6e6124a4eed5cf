"""The binaries, started as `python -m experiments.NAME`.

On Linux they ask for huge pages for large arrays (`glibc.malloc.hugetlb`),
where glibc (2.35 or newer) and the kernel have them.
Every program of a step asks for fresh memory, and the kernel fills it with
zeros page by page as it is touched, which on CPU takes longer than many a
program; with pages of 2 MiB there are fewer. The C library reads the setting
when a process starts and never again, so it is started anew, before anything
heavy is imported. Whoever has set GLIBC_TUNABLES keeps that.
"""

import os
import sys

_TUNABLES = "GLIBC_TUNABLES"

# While `python -m` looks for its module, that is the name of the program.
if (
    sys.argv[:1] == ["-m"]
    and sys.platform == "linux"
    and _TUNABLES not in os.environ
    and sys.executable
):
  os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
