"""Studies and distillations: how the numbers of the documentation came about."""
