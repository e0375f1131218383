"""Runs ``train.py`` in the folder given as an interpreter does that has imported nothing of ours, nor ``clipped``.

The other argument is where that package lies; the folder holds what an installation says of it.
"""

from __future__ import annotations

import os
import runpy
import sys

folder, package = sys.argv[1:]
for name in [name for name in sys.modules if name.partition(".")[0] in ("lightning_efficient", "clipped")]:
    del sys.modules[name]
os.chdir(folder)
os.environ["LIGHTNING_EFFICIENT"] = "m.yaml"
sys.path[:0] = [package, folder]
sys.argv[:] = ["train.py"]
runpy.run_path("train.py", run_name="__main__")
