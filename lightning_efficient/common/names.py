"""Names that users and several rooms know: environment variables, prefixes of logged quantities."""

VARIABLE = "LIGHTNING_EFFICIENT"  # a YAML file of methods for any training script
RUN_VARIABLE = "LIGHTNING_EFFICIENT_RUN"  # set by `ablate` for the processes it starts
COST = "efficient/run_cost/"
EXPORTED = "efficient/export/"
