"""This process as SGLang's own classes need it before they can be built, without a server."""

from __future__ import annotations

import dataclasses
import socket
from typing import Any


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_sglang(**more: object) -> None:
    """What a server does before it builds a model: arguments and one-process groups. Once.

    ``more``: arguments that are not the defaults.
    """
    import torch.distributed
    from sglang.srt import server_args
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.moe.utils import initialize_moe_config

    if torch.distributed.is_initialized():
        return
    publishes = hasattr(server_args.ServerArgs, "resolve_once")  # to a context, from 0.5.22 on
    arguments = () if publishes else (_arguments(more),)
    if publishes:
        _publish(more)
    init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method=f"tcp://127.0.0.1:{free_port()}",
        backend="gloo",
    )
    initialize_model_parallel()
    initialize_moe_config(*arguments)


def _arguments(more: dict[str, object]) -> Any:
    """The server's arguments, known to all of SGLang."""
    from sglang.srt import server_args

    # ServerArgs checks and completes itself for a real model folder; here the defaults will do.
    arguments: Any = server_args.ServerArgs.__new__(server_args.ServerArgs)
    for field in dataclasses.fields(server_args.ServerArgs):
        value = field.default
        if value is dataclasses.MISSING:
            made = field.default_factory
            value = None if made is dataclasses.MISSING else made()
        object.__setattr__(arguments, field.name, value)
    arguments.device = "cpu"
    for name, value in more.items():
        setattr(arguments, name, value)
    server_args.set_global_server_args_for_scheduler(arguments)
    return arguments


def _publish(more: dict[str, object]) -> None:
    """The server's arguments and this process's place, in SGLang's context."""
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    given: dict[str, Any] = {"device": "cpu", **more}
    arguments = ServerArgs(model_path="dummy", **given)  # "dummy": no model folder is read
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0))
