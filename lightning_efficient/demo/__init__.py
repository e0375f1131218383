"""The demo: a real, small data set, a model that knows nothing of this package, and a YAML file a variant."""
