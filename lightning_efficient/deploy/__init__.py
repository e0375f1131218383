"""From a trained model to a plain one: export, files, measurement."""
