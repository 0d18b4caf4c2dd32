"""megalm: 3D-parallel training of language models. Nothing is imported here, so that `megalm --help` answers at once."""

__version__ = "0.1.0"
