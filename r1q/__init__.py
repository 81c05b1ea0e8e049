"""r1q: the smallest, fastest file of a reasoning model for the device at hand, with proof that it still thinks straight."""

__version__ = "0.1.0"
__all__ = ["__version__"]
