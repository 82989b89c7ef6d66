"""The parts of a model: one module per kind, each with its table from name to class."""
