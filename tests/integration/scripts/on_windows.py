"""Imports the whole package where Python looks like that of Windows, as far as the package can see."""

import importlib
import os
import pkgutil
import signal
import sys

import lightning_efficient

MODULES = sorted(m.name for m in pkgutil.walk_packages(lightning_efficient.__path__, "lightning_efficient."))
MODULES.remove("lightning_efficient.__main__")
UNIX = ("fcntl", "resource", "termios", "pwd", "grp", "pty")
CALLS = ("fork", "killpg", "getpgrp", "setpgid", "setsid", "getppid", "sched_getaffinity", "getuid", "register_at_fork")
SIGNALS = ("SIGKILL", "SIGHUP", "SIGCHLD", "SIGALRM", "SIGUSR1", "SIGUSR2")

for name in MODULES:  # with what they import of other packages, which is not in question
    importlib.import_module(name)
for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_efficient"]:
    del sys.modules[name]
for name in CALLS:
    delattr(os, name)
for name in SIGNALS:
    delattr(signal, name)
sys.modules |= dict.fromkeys(UNIX)  # type: ignore[arg-type]  # None: "No module named"
sys.platform = "win32"

for name in MODULES:
    importlib.import_module(name)
print(f"{len(MODULES)} modules")

from lightning_efficient.ablation.run import ablate  # noqa: E402

try:
    ablate(["sigma_reparam"])
except NotImplementedError as error:
    print(error)
