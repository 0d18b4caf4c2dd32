"""Checkpoints as folders of safetensors and JSON, loadable under any layout. README.md documents the format."""

from megalm.checkpoint.find import fault, find, newest, read_manifest
from megalm.checkpoint.format import CheckpointError
from megalm.checkpoint.fragment import Fragment
from megalm.checkpoint.load import Weights, load, read_weights
from megalm.checkpoint.lock import hold
from megalm.checkpoint.resume import Difference, check_resume, choose, differences, flatten, replaces_all
from megalm.checkpoint.save import save

__all__ = ["CheckpointError", "Difference", "Fragment", "Weights", "check_resume", "choose", "differences", "fault", "find",
           "flatten", "hold", "load", "newest", "read_manifest", "read_weights", "replaces_all", "save"]
