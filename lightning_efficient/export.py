"""Taking a trained model out: ``lightning_efficient.export`` as a module, which can also be called.

The public function has the name of this module, and whichever was imported last would hide the other. So the module is
the function as well: calling it is ``export.export``.
"""

from __future__ import annotations

import sys
from types import ModuleType

from lightning_efficient.deploy.export import ExportError, export, to_onnx, to_torch_export
from lightning_efficient.deploy.folder import save_pretrained
from lightning_efficient.deploy.formats import save_exported
from lightning_efficient.deploy.measure import log_exported, slim_report
from lightning_efficient.deploy.semi_structured import to_semi_structured

__all__ = [
    "ExportError",
    "export",
    "log_exported",
    "save_exported",
    "save_pretrained",
    "slim_report",
    "to_onnx",
    "to_semi_structured",
    "to_torch_export",
]


class _Export(ModuleType):
    __call__ = staticmethod(export)


__wrapped__ = export  # whose signature is shown
sys.modules[__name__].__class__ = _Export
