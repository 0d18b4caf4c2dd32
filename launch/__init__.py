"""Starting jobs: the ranks of this machine, or one rank under the deepspeed launcher or torchrun."""
