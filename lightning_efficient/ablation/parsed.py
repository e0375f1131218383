"""Where a command line has been parsed and checked, and nothing has been made of it yet."""

from __future__ import annotations

from lightning.pytorch.loggers.logger import DummyLogger


class EndOfParsing(DummyLogger):
    """As a command line's only logger it ends the process, successfully, once everything has been parsed.

    LightningCLI checks all arguments together, those that are required among them, before it makes anything; what the
    Trainer is given it makes first. Where a script links arguments ``apply_on="instantiate"``, data and model come
    before that.
    """

    def __init__(self) -> None:
        super().__init__()
        raise SystemExit(0)
