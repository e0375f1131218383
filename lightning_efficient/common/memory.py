"""The memory of this process."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path


def peak_resident() -> int | None:
    """Largest resident size of this process so far, in bytes; ``None`` where the system does not tell (Windows).

    On Linux not by ``getrusage``: its figure outlives ``exec``, so that a small process which a large one has started
    would have the size of the large one.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
