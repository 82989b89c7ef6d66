"""The parts of a model, one module a kind, each with its table from name to class."""
