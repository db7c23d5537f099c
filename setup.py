"""Everything but the list of packages is in pyproject.toml, which cannot join a search with folders from elsewhere."""

from setuptools import find_namespace_packages, setup

SHIPPED = ["nemo_minitron._shipped.configs", "nemo_minitron._shipped.constraints", "nemo_minitron._shipped.recipes"]

setup(packages=[*find_namespace_packages(include=["nemo_minitron", "nemo_minitron.*"]), *SHIPPED])
