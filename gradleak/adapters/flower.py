"""Flower: a mod on the client, a wrapper of the strategy on the server (extra ``flower``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradleak.adapters.recorder import Policy, Recorder
from gradleak.errors import InvalidInput
from gradleak.types import Update, UpdateKind

try:
    import flwr
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
    from flwr.clientapp.mod import LocalDpMod
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Strategy
except ImportError as error:
    raise InvalidInput("The adapter for Flower needs the extra 'flower': pip install 'gradleak[flower]'.") from error

__all__ = ["CaptureMod", "CaptureStrategy", "defenses_of"]


@dataclass(frozen=True)
class CaptureMod:
    """A mod that records each update as it leaves the client: the weights after training minus those received.

    Put it **first** in the list, ``ClientApp(mods=[CaptureMod(recorder), LocalDpMod(…)])``: the first mod is the
    outermost, so that it sees what those after it (clipping, noise) made of the update. Messages pass unchanged; where
    the recorder's policy blocks an update, Flower reports an error of the client in its place.

    Attributes:
        recorder: writes the updates.
        examples: name of the metric with the number of examples.
    """

    recorder: Recorder
    examples: str = "num-examples"

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        """Pass a message on, and record the reply to one that asks for training."""
        if message.metadata.message_type.split(".")[0] != "train":
            return call_next(message, context)
        before = _state(message)
        reply = call_next(message, context)
        if not reply.has_error():
            client = context.node_config.get("partition-id", context.node_id)
            _record(self.recorder, before, reply, _round(message), str(client), self.examples)
        return reply


@dataclass
class CaptureStrategy(Strategy):  # type: ignore[misc]
    """A strategy that records what each client sent, as the server sees it, and otherwise does what another one does.

    Attributes:
        strategy: that decides.
        recorder: writes the updates.
        examples: name of the metric with the number of examples.
    """

    strategy: Strategy
    recorder: Recorder
    examples: str = "num-examples"
    _sent: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.recorder.policy == Policy.BLOCK:
            raise InvalidInput("On the server an update has left already; block it in a CaptureMod, or warn here.")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages of the strategy, whose weights are remembered."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._sent = {m.metadata.dst_node_id: _state(m) for m in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Record the replies, and return what the strategy makes of them."""
        replies = list(replies)
        for reply in replies:
            node = reply.metadata.src_node_id
            if not reply.has_error() and node in self._sent:
                _record(self.recorder, self._sent[node], reply, server_round, str(node), self.examples)
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages of the strategy."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return what the strategy makes of the replies."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the strategy's summary."""
        self.strategy.summary()


def defenses_of(mods: Sequence[object]) -> tuple[str, ...]:
    """Return Flower's own privacy mods, in the order in which they are listed, as a recorder's ``defense``.

    The mod that is listed last changes the update first.

    Raises:
        InvalidInput: a mod is not known; say what it does yourself, with ``defense`` or ``unknown_filters``.
    """
    found: list[str] = []
    for mod in reversed(mods):
        if isinstance(mod, CaptureMod):
            continue
        if not isinstance(mod, LocalDpMod):
            name = getattr(mod, "__name__", type(mod).__name__)
            raise InvalidInput(f"The mod {name!r} is not known; say what it does with defense or unknown_filters.")
        sigma = mod.sensitivity * float(np.sqrt(2 * np.log(1.25 / mod.delta))) / mod.epsilon
        found += [f"clip:norm={mod.clipping_norm!r}", f"gaussian_noise:sigma={float(sigma)!r}"]
    return tuple(found)


def _state(message: Message) -> dict[str, Tensor]:
    """Return the arrays of a message by name, in memory of their own."""
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise InvalidInput(
            f"The message carries {len(records)} records of arrays; gradleak records models sent as one."
        )
    return {k: torch.from_numpy(np.array(v.numpy())) for k, v in records[0].items()}


def _round(message: Message) -> int | None:
    for config in message.content.config_records.values():
        if isinstance(config.get("server-round"), int):
            return int(config["server-round"])
    return None


def _record(
    recorder: Recorder, before: Mapping[str, Tensor], reply: Message, number: int | None, client: str, examples: str
) -> None:
    after = _state(reply)
    if set(after) != set(before):
        raise InvalidInput("The client's arrays are named otherwise than those sent; gradleak records whole models.")
    counts: list[Any] = [m[examples] for m in reply.content.metric_records.values() if examples in m]
    update = Update({k: after[k] - before[k] for k in recorder.trained}, UpdateKind.WEIGHT_DELTA)
    recorder.record(
        before, update, framework=f"Flower {flwr.__version__}", round=number, client=client,
        examples=int(counts[0]) if counts else None,
    )  # fmt: skip
