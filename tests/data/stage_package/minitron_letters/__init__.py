"""A package that adds a kind of stage to nemo-minitron: it counts a letter in the vocabulary of a model."""
