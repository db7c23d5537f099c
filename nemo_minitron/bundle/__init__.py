"""One file that takes recipes to a machine without a network: what they need, the wheels, and a script."""
