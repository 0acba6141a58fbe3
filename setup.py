"""Metadata lives in pyproject.toml; this file is where the CUDA extension of ``kernels/`` will be built."""

from setuptools import setup

setup()
