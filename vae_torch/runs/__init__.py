"""A whole run: data, model, loop, records, and how it is stopped and resumed."""
