"""Defects that these patches look for: no release has them, development trees between two had.

Each is a row, the code of a port (`gemma4_turbo.engine.run.PatchModule`), named ``mtp.defects:<patch>``
in `sources`. A row looks in the source that is imported and mends what it finds there; where it finds
nothing, stock's functions stay.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma4_turbo.engine import states
from gemma4_turbo.runtime.attempts import attempt, one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.fingerprints import Definitions
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, FrozenKVContext, ServerArgs
    from gemma4_turbo.ports.v0_5_12.protocols import (
        AssistantConfig,
        LaunchedAssistant,
        WindowedBackend,
        WindowedRunner,
        WindowedWorker,
    )

logger = logging.getLogger("gemma4_turbo")
Replacements = dict[str, Any]


class Defect(NamedTuple):
    """One patch: what it looks for, and what mends it."""

    look: Callable[[Definitions], list[str]]  # what of the defect a source has, in words
    mend: Callable[[PatchRun, dict[str, Any], list[str]], Replacements]
    absent: str = ""  # told where nothing is found
    # Of one that mends ``ServerArgs``: whether it is about these; see `ports.any.late_arguments`.
    concerns: Callable[[ServerArgs], bool] | None = None

    def build(self, run: PatchRun, stock: dict[str, Any]) -> Replacements:
        """Mend what is wrong in the imported source; `NotNeededError` if nothing is."""
        found = self.look(run.definitions())
        if not found:
            raise states.NotNeededError(self.absent)
        logger.info("gemma4_turbo: %s: %s", run.patch.name, "; ".join(found))
        return self.mend(run, stock, found)


# -- `frozen_kv_views` ----------------------------------------------------------------------------
#
# The assistant reads the target's KV pool. Stock swaps that pool in for the length of a ``with``, but
# an attention backend that took its sliding-window state from the draft's own pool, when it was
# made, keeps that state: it looks up sliding layers with page numbers of the full pool. Here both
# views and the capture of the draft's CUDA graphs bring the state in step, and put it back on every
# way out. A release whose backend takes its pool from the allocator, which draft and target share,
# has nothing to bring in step: the port tells it by a name (`superseded_when`).

UTILS = "sglang.srt.speculative.frozen_kv_mtp_utils"
RUNNER = "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner:FrozenKVMTPCudaGraphRunner"
VIEWS = (f"{UTILS}:frozen_kv_target_view", f"{UTILS}:target_kv_pool_view")
MAKE, CAPTURE = f"{RUNNER}.__init__", f"{RUNNER}.capture_one_batch_size"
MAY_BE_STALE = "the draft's backend may keep the state of a KV pool that is swapped out"


class WindowState(NamedTuple):
    """What a backend keeps of a sliding-window KV pool."""

    use_sliding_window_kv_pool: bool
    swa_kv_pool: object | None  # the pool itself, None without a sliding window


def view_defects(definitions: Definitions) -> list[str]:
    """The port has ruled out what the source shows; whether a state is stale, the first call shows."""
    return [MAY_BE_STALE]


def _mend_views(run: PatchRun, stock: dict[str, Any], found: list[str]) -> Replacements:
    """Both views and the draft's graph runner, each inside `in_step`."""
    return {
        **{target: _view(run, stock[target]) for target in VIEWS},
        MAKE: _make(run, stock[MAKE]),
        CAPTURE: _capture(run, stock[CAPTURE]),
    }


def _view(
    run: PatchRun, view: Callable[..., AbstractContextManager[object]]
) -> Callable[..., AbstractContextManager[object]]:
    @functools.wraps(view)
    @contextlib.contextmanager
    def kv_view(
        forward_batch: ForwardBatch,
        kv_context: FrozenKVContext | None,
        *rest: WindowedBackend,
        **named: WindowedBackend,
    ) -> Iterator[object]:
        # Later sources name the backend; earlier ones mean the one that the batch carries.
        backend = rest[0] if rest else named.get("draft_attn_backend")
        if backend is None:
            backend = getattr(forward_batch, "attn_backend", None)
        with (
            view(forward_batch, kv_context, *rest, **named) as value,
            in_step(run, backend, kv_context),
        ):
            yield value

    return kv_view


def _make(run: PatchRun, construct: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(construct)
    def __init__(
        self: WindowedRunner, frozen_kv_mtp_worker: WindowedWorker, *args: object, **kwargs: object
    ) -> None:
        # The constructor lets the backend allocate its page tables, then captures.
        with in_step(run, frozen_kv_mtp_worker.draft_attn_backend, frozen_kv_mtp_worker.kv_context):
            construct(self, frozen_kv_mtp_worker, *args, **kwargs)

    return __init__


def _capture(run: PatchRun, capture: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(capture)
    def capture_one_batch_size(self: WindowedRunner, *args: object, **kwargs: object) -> object:
        worker = self.frozen_kv_mtp_worker
        with in_step(run, worker.draft_attn_backend, worker.kv_context):
            return capture(self, *args, **kwargs)

    return capture_one_batch_size


@contextlib.contextmanager
def in_step(
    run: PatchRun, backend: WindowedBackend | None, kv_context: FrozenKVContext | None
) -> Iterator[None]:
    """Hold ``backend``'s sliding-window state in step with the target's pool.

    Args:
        run: counts the calls in which something was stale; told when nothing can be.
        backend: the draft's attention backend.
        kv_context: stock's ``FrozenKVMTPContext``; None while the model is not bound.
    """
    pool = getattr(kv_context, "target_token_to_kv_pool", None)
    if pool is None or backend is None:
        yield
        return
    kept, wanted = state_of(backend), state_for(pool)
    fine = _unfit(backend, kept, wanted)
    if fine is not None or kept is None:
        if not run.engaged_count():
            # A backend sets its state once, when it is made: it will not become stale.
            run.stand_aside(states.UPSTREAMED, f"nothing is stale: {fine}")
        yield
        return
    run.engaged(False)
    _set(backend, wanted)
    try:
        yield
    finally:
        _set(backend, kept)


def _unfit(backend: object, kept: WindowState | None, wanted: WindowState) -> str | None:
    if kept is None:
        return f"{type(backend).__name__} keeps no sliding-window state"
    same = kept.use_sliding_window_kv_pool == wanted.use_sliding_window_kv_pool
    if same and kept.swa_kv_pool is wanted.swa_kv_pool:
        return f"{type(backend).__name__} reads the target's KV pool already"
    return None


def state_of(backend: WindowedBackend) -> WindowState | None:
    """The state that ``backend`` keeps, None for a kind that keeps none."""
    try:
        return WindowState(backend.use_sliding_window_kv_pool, backend._swa_kv_pool)
    except AttributeError:
        return None


def state_for(pool: object) -> WindowState:
    """The state that a backend over ``pool`` has to have."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    sliding = isinstance(pool, SWAKVPool)
    return WindowState(sliding, pool if sliding else None)


def _set(backend: WindowedBackend, state: WindowState) -> None:
    backend.use_sliding_window_kv_pool, backend._swa_kv_pool = state


# -- `mtp_launch` ---------------------------------------------------------------------------------
#
# Two things without which some source trees cannot load an assistant. Its constructor does not run
# that of its base class, so what the base class sets there and reads elsewhere is missing: the
# pipeline group. And its configuration has no number of experts, of which a base class that names
# weights expert by expert wants a number. Each is mended only where the source has it.

BASE = "sglang.srt.models.gemma4_causal:Gemma4ForCausalLM"
ASSISTANT = "sglang.srt.models.gemma4_mtp:Gemma4AssistantForCausalLM"
CONSTRUCT, LOAD = f"{ASSISTANT}.__init__", f"{ASSISTANT}.load_weights"
NO_PP_GROUP = "the assistant has no pp_group, which its base class reads"
NO_EXPERTS = "num_experts may be None where the base class counts to it"


def launch_defects(definitions: Definitions) -> list[str]:
    """Which of the two the source has."""
    found = []
    if definitions.uses(BASE, "pp_group") and not definitions.uses(CONSTRUCT, "pp_group"):
        found.append(NO_PP_GROUP)
    load = definitions.node(f"{BASE}.load_weights")
    if definitions.uses(f"{BASE}.load_weights", "make_expert_params_mapping") and not any(
        _gives_a_number(node) for node in ast.walk(load or ast.Module([], []))
    ):
        found.append(NO_EXPERTS)
    return found


def _gives_a_number(node: ast.AST) -> bool:
    """``num_experts = ... or ...``, also as a conditional expression."""
    return (
        isinstance(node, ast.Assign)
        and any(isinstance(to, ast.Name) and to.id == "num_experts" for to in node.targets)
        and any(isinstance(part, ast.BoolOp | ast.IfExp) for part in ast.walk(node.value))
    )


def _mend_launch(run: PatchRun, stock: dict[str, Any], found: list[str]) -> Replacements:
    replacements = dict(stock)
    if NO_PP_GROUP in found:
        replacements[CONSTRUCT] = _construct(run, stock[CONSTRUCT])
    if NO_EXPERTS in found:
        replacements[LOAD] = _load(run, stock[LOAD])
    return replacements


def _construct(run: PatchRun, construct: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(construct)
    def __init__(self: LaunchedAssistant, *args: object, **kwargs: object) -> None:
        def mend() -> None:
            from sglang.srt.distributed import get_pp_group

            # Into the instance itself: before its constructor has run, a Module takes no attribute.
            vars(self)["pp_group"] = get_pp_group()

        _, problem = attempt(run, "the pipeline group", mend)
        if problem is None:
            run.engaged(False)
        else:
            run.declined(problem)
        construct(self, *args, **kwargs)

    return __init__


def _load(run: PatchRun, load: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(load)
    def load_weights(self: LaunchedAssistant, weights: object) -> object:
        with without_experts(run, self.config):
            return load(self, weights)

    return load_weights


@contextlib.contextmanager
def without_experts(run: PatchRun, config: AssistantConfig) -> Iterator[None]:
    """A configuration that has no number of experts has 0 for the length of this."""
    missing: Any = object()
    kept = getattr(config, "num_experts", missing)
    if kept is not missing and kept is not None:
        yield
        return
    try:
        config.num_experts = 0
    except Exception as error:  # a configuration that does not change
        run.set(states.FAILED, one_line(error))
        run.declined(one_line(error))
        yield
        return
    run.engaged(False)
    try:
        yield
    finally:
        if kept is missing:
            del config.num_experts
        else:
            config.num_experts = kept


# -- `mtp_moe_runner` -----------------------------------------------------------------------------
#
# Some source trees choose FlashInfer's runner for every Gemma 4 MoE on a GPU that has it, though it
# takes quantised weights only. Such a choice is taken back to ``auto`` where the weights are not
# quantised; what the user asked for stays.

ADJUST = "sglang.srt.server_args:ServerArgs._handle_model_specific_adjustments"
BLIND = "a FlashInfer runner is chosen for Gemma 4 without looking at the weights"
_HEEDS_QUANTISATION = re.compile(r"quant|modelopt|fp4|fp8")


def runner_defects(definitions: Definitions) -> list[str]:
    """Whether the source chooses a runner blindly."""
    return [BLIND] if chooses_blindly(definitions.node(ADJUST)) else []


def chooses_blindly(node: ast.AST | None) -> bool:
    """Whether a branch for Gemma 4 sets a FlashInfer runner with no word of quantisation.

    Args:
        node: the definition of the adjustments.
    """
    return node is not None and any(
        "Gemma4" in ast.unparse(branch.test) and _sets_flashinfer(branch.body)
        for branch in ast.walk(node)
        if isinstance(branch, ast.If)
    )


def _sets_flashinfer(body: list[ast.stmt]) -> bool:
    """In these statements, or below an ``if`` of theirs that does not ask for quantisation."""
    for statement in body:
        if isinstance(statement, ast.If):
            if _HEEDS_QUANTISATION.search(ast.unparse(statement.test)):
                continue
            if _sets_flashinfer(statement.body) or _sets_flashinfer(statement.orelse):
                return True
        elif isinstance(statement, ast.Assign):
            sets = any(getattr(to, "attr", "") == "moe_runner_backend" for to in statement.targets)
            if sets and "flashinfer" in ast.unparse(statement.value):
                return True
    return False


def _mend_runner(run: PatchRun, stock: dict[str, Any], found: list[str]) -> Replacements:
    """Stock's adjustments, its choice of a runner checked."""
    adjust = stock[ADJUST]

    @functools.wraps(adjust)
    def _handle_model_specific_adjustments(self: ServerArgs) -> None:
        asked = self.moe_runner_backend
        adjust(self)
        if asked == "auto" and str(self.moe_runner_backend).startswith("flashinfer"):
            try:
                blind = is_unquantised_gemma4(self)
            except Exception as error:  # never in the way of a server that stock can start
                run.declined(one_line(error))
                return
            if blind:
                self.moe_runner_backend = asked
                run.engaged(False)

    return {ADJUST: _handle_model_specific_adjustments}


def is_unquantised_gemma4(server_args: ServerArgs) -> bool:
    """Whether stock's ``ServerArgs`` are for a Gemma 4 whose weights are not quantised."""
    model_config = server_args.get_model_config()
    architectures = getattr(model_config.hf_config, "architectures", None) or ()
    return (
        any(name.startswith("Gemma4") for name in architectures)
        and server_args.quantization is None
        and getattr(model_config, "quantization", None) is None
    )


# -- the rows -------------------------------------------------------------------------------------

frozen_kv_views = Defect(look=view_defects, mend=_mend_views)
mtp_launch = Defect(
    look=launch_defects,
    mend=_mend_launch,
    absent="this source has neither defect: pp_group is there or unread, num_experts is a number "
    "where it is counted to",
)
mtp_moe_runner = Defect(
    look=runner_defects,
    mend=_mend_runner,
    absent="this source chooses no FlashInfer runner for Gemma 4 without looking at the weights",
    concerns=is_unquantised_gemma4,
)
