"""Package build. Metadata lives in pyproject.toml; compiled parts of csrc/ will be declared here."""

from setuptools import setup

setup()
