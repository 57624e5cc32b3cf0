"""Momentum Contrast (MoCo) pretraining at the speed of the hardware."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("linerate")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+checkout"
