"""The demo: a real, small data set, a model that knows nothing of this package, two YAML files, one comparison."""
