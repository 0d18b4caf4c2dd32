"""Our groups in the words DeepSpeed asks for them, and its start-up."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch.distributed as dist

from megalm.parallel.groups import Groups
from megalm.parallel.world import LaunchError

OLDEST_DEEPSPEED = "0.19.8"


class Grid:
    """The `mpu` of the sequential engine: model parallel = tensor parallel, since there is one stage.

    DeepSpeed probes for methods, and takes the presence of get_sequence_* as another layout: they stay undefined.
    """

    def __init__(self, groups: Groups):
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        return self._groups.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._groups.tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tp.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._groups.place.dp

    def get_data_parallel_world_size(self) -> int:
        return self._groups.plan.dp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.dp_group


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's start-up chatter off stdout; when it fails, show what it had to say."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except BaseException:
        if said.getvalue():
            print(said.getvalue(), flush=True)
        raise


def adopt_process_group() -> None:
    """Let DeepSpeed take over the torch.distributed that parallel/groups started.

    On CPU it would first compile a shared-memory op: without ninja it dies, and a process killed meanwhile leaves a lock
    on which every later run waits for ever. Nothing is compiled inside a training job.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import groups as deepspeed_groups
    from deepspeed.utils import logger
    from packaging.version import Version

    if Version(deepspeed.__version__.partition("+")[0]) < Version(OLDEST_DEEPSPEED):
        raise LaunchError(f"deepspeed {deepspeed.__version__} is installed; at least {OLDEST_DEEPSPEED} is needed: "
                          "older ones scale the gradients of a pipeline wrongly, which Adam hides")
    logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by the names that torch 2.13 renamed; it is told at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    # The table of ops that can be compiled is made on first access, by compiling in every rank. Its one reader in training is the
    # shared-memory op, so it starts empty instead.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed_groups.mpu = None  # it outlives an engine; a second one in the process would inherit it
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
