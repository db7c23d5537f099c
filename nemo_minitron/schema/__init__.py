"""The keys that sections of a recipe share, with their defaults. The keys of one kind of stage are in its folder."""
