"""What `dllm status`, `plan` and `--stats` say: sentences and cells, made of facts. Pure."""

from collections.abc import Sequence
from pathlib import Path

from distributed_llm.client.answers import Generation
from distributed_llm.common.keys import fingerprint
from distributed_llm.common.layer_states import HELD_STATES
from distributed_llm.common.messages import (
    ClusterStatus,
    EventStatus,
    MachineStatus,
    StageTiming,
    TokenStatus,
    WorkerStatus,
)
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.common.wording import (
    count_text,
    duration_text,
    fetch_text,
    layers_text,
    list_text,
    rate_text,
    room_text,
    size_text,
    stacks_text,
    times_text,
)
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import PlannedStage, kv_tokens_of
from distributed_llm.coordinator.planning.dry_run import MANY, DryRun
from distributed_llm.weights.cache.contents import Contents, KeptModel

WORKER_COLUMNS = (
    "worker",
    "state",
    "plan",
    "layers",
    "link",
    "memory",
    "weights",
    "KV cache",
    "tasks",
    "speed",
)
STAGE_COLUMNS = ("worker", "layers", "memory", "weights", "room for KV cache")
TIMING_COLUMNS = ("worker", "layers", "tasks", "compute")

TOKEN_COLUMNS = ("token", "lets join as", "machines", "expires")
MACHINE_COLUMNS = ("machine", "may be", "key", "enrolled", "connections")

CACHE_COLUMNS = ("model", "kept", "of", "last used")

# ------------------------------------------------------------------ status


def headline(status: ClusterStatus) -> str:
    """Return which model is served, by which plans, and how full they are."""
    layers = count_text(status.num_layers, "layer")
    if status.encoder_layers:
        layers += f", {status.encoder_layers:,} of them the encoder's"
    what = f"{status.model} ({layers}): {status.state}"
    epochs = sorted({worker.epoch for worker in status.workers if worker.layers})
    if epochs:
        what += f" {'plan' if len(epochs) == 1 else 'plans'} {list_text(map(str, epochs))}"
    if len(epochs) > 1:
        what += ", each the whole model"
    if status.insecure:
        what += " (NO KEYS: whoever reaches its port may do everything)"
    if status.quarantined:
        what += f" (quarantined: {list_text(status.quarantined)})"
    forms = {
        formats_text(status.files, pipeline.memory, exact=pipeline.exact)
        for pipeline in status.pipelines
        if status.files and status.files != pipeline.memory
    }
    if forms:
        what += f"; weights: {list_text(sorted(forms))}"
    if status.state != "serving":
        return what
    if read := sum(pipeline.disk_bytes for pipeline in status.pipelines):
        what += f"; {size_text(read)} of weights are read from disks for every token"
    if copied := sum(pipeline.ram_bytes for pipeline in status.pipelines):
        what += f"; {size_text(copied)} of weights are copied to GPUs for every token"
    if status.most_texts:
        room = room_text(status.kv_tokens, status.most_texts)
        return f"{what}; {status.answers_running:,} under way, and room for {room}"
    kept = {p.kv_dtype for p in status.pipelines} - {"auto"}
    longest = max((pipeline.kv_longest_tokens for pipeline in status.pipelines), default=0)
    one = f", and room for {longest:,} in one request" if longest > status.kv_tokens else ""
    return (
        f"{what}; {status.kv_tokens_used:,} of {count_text(status.kv_tokens, 'token')} of context "
        f"in use{one}{''.join(f', kept in {kv_dtype}' for kv_dtype in kept)}"
    )


def request_lines(status: ClusterStatus) -> list[str]:
    """Return what has become of requests and their answers."""
    ended = {
        "finished": status.requests_finished,
        "cancelled": status.requests_cancelled,
        "failed": status.requests_failed,
    }
    line = (
        f"answers: {status.answers_running:,} running, {status.answers_waiting:,} waiting; "
        f"requests: {', '.join(f'{count:,} {what}' for what, count in ended.items())}; "
        f"{count_text(status.tokens_generated, 'token')} generated"
    )
    lines = [line]
    if status.prefix_hit_tokens:
        shared = count_text(status.prefix_hit_tokens, "token")
        was = "was" if status.prefix_hit_tokens == 1 else "were"
        lines.append(f"{shared} of prompts {was} in the KV cache already")
    if status.preemptions:
        lines.append(
            f"answers gave their memory up to others {times_text(status.preemptions)}; they go on "
            "later"
        )
    if status.moves:
        stood_still = f"; the latest move stopped answers for {duration_text(status.move_stall_s)}"
        lines.append(
            f"layers moved {times_text(status.moves)}{stood_still if status.move_stall_s else ''}"
        )
    return lines


def fetch_lines(status: ClusterStatus) -> list[str]:
    """Return how far the weights have come that workers fetch from other machines."""
    lines = []
    for worker in status.workers:
        if one := worker.fetch:
            far = fetch_text(one.here_bytes, one.total_bytes, one.bytes_per_s, one.doing)
            lines.append(f"{worker.name} gets weights: {far}")
    return lines


def kernel_lines(status: ClusterStatus) -> list[str]:
    """Return by what GPUs multiply weights of integers."""
    return [
        f"{worker.name} multiplies {worker.kernels}" for worker in status.workers if worker.kernels
    ]


def event_line(event: EventStatus) -> str:
    """Return what happened, and how often and how long ago if that was several times."""
    if event.times == 1:
        return event.text
    ago = duration_text(event.age_s)
    return f"{event.text} ({times_text(event.times)}, the last time {ago} ago)"


def worker_row(worker: WorkerStatus, encoder_layers: int = 0) -> list[str]:
    """Return the cells of `WORKER_COLUMNS`.

    Args:
        worker: of which they tell.
        encoder_layers: of the model; 0: it is a decoder alone.
    """
    now, then = (
        stacks_text(layers, encoder_layers) if layers else "-"
        for layers in (worker.layers, worker.next_layers)
    )
    return [
        worker.name,
        worker.state,
        str(worker.epoch) if worker.layers else "-",
        f"{now} -> {then}" if worker.next_layers else now,
        worker.link or "-",
        size_text(worker.capabilities.memory_bytes),
        size_text(worker.weight_bytes),
        size_text(worker.kv_bytes),
        f"{worker.tasks_done:,}",
        _speed_text(worker),
    ]


def _speed_text(worker: WorkerStatus) -> str:
    """Return the measured time per token, and how far predictions of it are off."""
    if not worker.seconds_per_token:
        return "-"
    error = worker.prediction_error
    off = "" if error is None else f" ±{100 * error:.0f} %"
    return f"{worker.seconds_per_token * 1000:.2f} ms/token{off}"


# ------------------------------------------------------------------ a dry run


def stage_row(stage: PlannedStage, memory_bytes: int, cost: ModelCost) -> list[str]:
    """Return the cells of `STAGE_COLUMNS`."""
    one_text = 0 if cost.kv_bytes(stage.layers) else HELD_STATES * cost.state_bytes(stage.layers)
    texts = stage.kv_tokens // one_text if one_text else 0  # of such a stage, tokens are bytes
    return [
        stage.worker,
        stacks_text(stage.layers, cost.encoder_layers),
        size_text(memory_bytes),
        size_text(stage.weight_bytes),
        "-" if cost.only_encodes(stage.layers) else room_text(stage.kv_tokens, texts),
    ]


def plan_lines(run: DryRun) -> list[str]:
    """Return what a dry run expects of all its plans, and of each machine."""
    used = {stage.worker for plan in run.plans for stage in plan}
    idle: list[WorkerId] = [worker for worker in run.memory if worker not in used]
    many = rate_text(run.many_tokens_per_s)
    return [
        *_format_lines(run),
        *([] if run.kv_dtype == "auto" else [f"context: kept in {run.kv_dtype}"]),
        *_window_lines(run),
        *_state_lines(run),
        f"memory: {size_text(run.cost.workspace_bytes)} of each machine are kept for what it "
        "computes with",
        *([f"without layers: {list_text(idle)}"] if idle else []),
        *_away_lines(run),
        f"expected: {rate_text(run.one_tokens_per_s)} for one request, {many} for {MANY} at once",
        *(f"{worker}: {advice.text}" for worker, advice in run.advice.items()),
    ]


def _away_lines(run: DryRun) -> list[str]:
    return [
        f"{stage.worker}: {size_text(nbytes)} of "
        f"{size_text(run.cost.weight_bytes(stage.layers))} {how} for every token"
        for plan in run.plans
        for stage in plan
        for nbytes, how in (
            (stage.ram_bytes, "do not fit on its GPU and are copied there from memory"),
            (stage.disk_bytes, "fit into no memory and are read from its disk"),
        )
        if nbytes
    ]


def _window_lines(run: DryRun) -> list[str]:
    """Return how long requests may be where layers with a window leave them more room."""
    windows = [window for window in run.cost.windows if window]
    longest = [
        tokens
        for tokens, plan in zip(run.longest_tokens, run.plans, strict=False)
        if tokens > kv_tokens_of(plan)
    ]
    if not windows or not longest:
        return []
    return [
        f"context: up to {count_text(max(longest), 'token')} in one request, for "
        f"{len(windows)} of {count_text(run.cost.num_layers, 'layer')} keep the last "
        f"{max(windows):,} and those of steps under way only"
    ]


def _state_lines(run: DryRun) -> list[str]:
    """Return what a request takes beside its context, in layers with a state of their own."""
    whole = LayerRange(0, run.cost.num_layers)
    size = run.cost.state_bytes(whole)
    if not size:
        return []
    layers = sum(map(bool, run.cost.layer_state_bytes))
    return [
        f"states: {size_text(HELD_STATES * size)} for each request, however long, in {layers} of "
        f"{count_text(run.cost.num_layers, 'layer')}; {size_text(size)} more for each point of a "
        "text from which others may go on"
    ]


def _format_lines(run: DryRun) -> list[str]:
    lines = []
    size, full = run.cost.all_weight_bytes, run.full_bytes
    if run.formats is not None:
        form = formats_text(run.formats.files, run.formats.memory, exact=run.formats.exact)
        lines.append(f"weights: {size_text(size)}; {form}")
    if full > size:
        lines.append(
            f"quantized to {run.cost.quantize} while loading, because these workers cannot hold "
            f"more: {size_text(size)} instead of {size_text(full)}"
        )
    return lines


def formats_text(files: str, memory: str, *, exact: bool) -> str:
    """Return in which form weights are in files and in memory."""
    if files == memory:
        return f"{files} in the files and in memory"
    nearest = "" if exact else ", by the nearest numbers that there are"
    return f"{files} in the files, {memory} in memory{nearest}"


# ------------------------------------------------------------------ members


def token_row(token: TokenStatus, now: float) -> list[str]:
    """Return the cells of `TOKEN_COLUMNS`; `now` is in seconds since 1970."""
    left = token.uses_left
    expires_at = token.expires_at
    return [
        token.id,
        token.role.value,
        "any number" if left is None else f"{left:,} more",
        "never" if expires_at is None else f"in {duration_text(max(0.0, expires_at - now))}",
    ]


def machine_row(machine: MachineStatus, now: float) -> list[str]:
    """Return the cells of `MACHINE_COLUMNS`; `now` is in seconds since 1970."""
    return [
        machine.name,
        machine.role.value,
        fingerprint(machine.key),
        f"{duration_text(max(0.0, now - machine.enrolled_at))} ago",
        sessions_text(machine),
    ]


def sessions_text(machine: MachineStatus) -> str:
    """Return how many connections a machine has, or for how long it may have none."""
    if machine.quarantined_s is None:
        return f"{machine.sessions:,}"
    return f"quarantined for {duration_text(max(1.0, machine.quarantined_s))}"


# ------------------------------------------------------------------ kept weights


def kept_model_row(model: KeptModel, now: float) -> list[str]:
    """Return the cells of `CACHE_COLUMNS`; `now` is in seconds since 1970."""
    return [
        model.name,
        size_text(model.kept_bytes),
        size_text(model.total_bytes),
        f"{duration_text(max(0.0, now - model.used_at))} ago",
    ]


def cache_line(folder: Path, contents: Contents) -> str:
    """Return how much a cache of weights holds, and what of that belongs to no model."""
    others = (
        (contents.unknown_bytes, "of no known model"),
        (contents.partial_bytes, "not complete yet"),
    )
    parts = [f"{size_text(nbytes)} {what}" for nbytes, what in others if nbytes]
    among = f" ({', '.join(parts)})" if parts else ""
    return f"{size_text(contents.total_bytes)} in {folder}{among}"


# ------------------------------------------------------------------ answers


def timing_row(stage: StageTiming) -> list[str]:
    """Return the cells of `TIMING_COLUMNS`."""
    return [
        stage.worker,
        str(stage.layers),
        f"{stage.tasks:,}",
        duration_text(stage.compute_s),
    ]


def answers_line(generations: Sequence[Generation]) -> str:
    """Return how many tokens the answers to a prompt took, and how fast that was."""
    timings, usage = generations[0].timings, generations[0].usage
    out = sum(generation.usage.completion_tokens for generation in generations)
    decoded = out - len(generations)
    then = f", then {rate_text(decoded / timings.decode_s)}" if timings.decode_s else ""
    cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
    reasons = ", ".join(generation.finish_reason for generation in generations)
    return (
        f"{count_text(usage.prompt_tokens, 'token')} in{cached}, {out:,} out "
        f"({reasons}); queued {duration_text(timings.queued_s)}, first token after "
        f"{duration_text(timings.first_token_s)}{then}"
    )


def drain_lines(name: str, held: WorkerStatus | None, encoder_layers: int = 0) -> tuple[str, str]:
    """Return what is said while a worker is waited for to leave, and once it has left.

    Args:
        name: of the worker.
        held: the worker, if it has layers.
        encoder_layers: of the model; 0: it is a decoder alone.
    """
    if held is None or held.layers is None:
        return "", f"{name}, which had no layers, has left"
    waiting = f"waiting until others serve {layers_text(held.layers, encoder_layers)} of {name} ..."
    return waiting, f"{name} has left, and others serve its layers"
