"""Checkpoints as folders of safetensors and JSON, loadable under any layout. README.md documents the format."""

from megalm.checkpoint.fetch import fetch_missing
from megalm.checkpoint.find import fault, find, newest, read_manifest
from megalm.checkpoint.fragment import Fragment
from megalm.checkpoint.load import Weights, load, read_weights
from megalm.checkpoint.lock import hold
from megalm.checkpoint.resume import Difference, check_resume, check_start, choose, differences, flatten, replaces_all, whole
from megalm.checkpoint.save import Saver, save
from megalm.checkpoint.sealed import CheckpointError, DamagedError
from megalm.checkpoint.uploads import uploads_of

__all__ = ["CheckpointError", "DamagedError", "Difference", "Fragment", "Saver", "Weights", "check_resume", "check_start",
           "choose", "differences", "fault", "fetch_missing", "find", "flatten", "hold", "load", "newest", "read_manifest",
           "read_weights", "replaces_all", "save", "uploads_of", "whole"]
