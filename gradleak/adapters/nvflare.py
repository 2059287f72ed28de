"""NVFlare: a filter on the client that sees what arrives and what leaves (extra ``nvflare``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradleak.adapters.recorder import Recorder
from gradleak.errors import InvalidInput
from gradleak.models import locate
from gradleak.types import Update, UpdateKind

try:
    import nvflare
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.apis.dxo_filter import DXOFilter
    from nvflare.apis.filter import FilterChainType, FilterContextKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_common.app_constant import AppConstants
except ImportError as error:
    raise InvalidInput("The adapter for NVFlare needs the extra 'nvflare': pip install 'gradleak[nvflare]'.") from error

__all__ = ["CaptureFilter"]

_RECEIVED = "gradleak.received"


class CaptureFilter(DXOFilter):  # type: ignore[misc]
    """A filter that records each update as it leaves the client; data pass unchanged.

    Add it twice: ``recipe.add_client_input_filter(…, tasks=["train"])`` remembers the weights that arrive, and, after
    all privacy filters, ``recipe.add_client_output_filter(…, tasks=["train"])`` records what leaves: whole weights
    (FULL), from which those that arrived are subtracted, or their difference (DIFF). Where the recorder's policy blocks
    an update, NVFlare reports an error of the filter in its place.
    """

    def __init__(self, folder: str, recorder: str, examples: int | None = None) -> None:
        """Prepare; NVFlare writes the arguments into a job's configuration, so they are plain.

        Args:
            folder: of the capture, absolute: clients run in folders of their own.
            recorder: ``module:name`` of a :class:`Recorder` in a module that clients can import.
            examples: number of examples behind an update, if all clients have as many.
        """
        super().__init__([DataKind.WEIGHTS, DataKind.WEIGHT_DIFF], None)
        self.folder, self.recorder, self.examples = folder, recorder, examples

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> None:
        """Remember weights on their way in, record an update on its way out."""
        tensors = {k: _tensor(v) for k, v in dxo.data.items()}
        if self.get_prop(FilterContextKey.CHAIN_TYPE) == FilterChainType.TASK_DATA_CHAIN:
            received = (shareable.get_header(AppConstants.CURRENT_ROUND), tensors)
            fl_ctx.set_prop(_RECEIVED, received, private=True, sticky=True)
            return
        received = fl_ctx.get_prop(_RECEIVED)
        if received is None:
            raise InvalidInput("No weights arrived; add the CaptureFilter to the client's input filters, too.")
        number, before = received
        recorder = locate(self.recorder)
        if not isinstance(recorder, Recorder):
            raise InvalidInput(f"{self.recorder!r} is a {type(recorder).__name__}; name a Recorder.")
        recorder = replace(recorder, folder=self.folder)
        whole = dxo.data_kind == DataKind.WEIGHTS
        update = {k: tensors[k] - before[k] if whole else tensors[k] for k in recorder.trained}
        recorder.record(
            before, Update(update, UpdateKind.WEIGHT_DELTA), framework=f"NVFlare {nvflare.__version__}", round=number,
            client=fl_ctx.get_identity_name(), examples=self.examples,
        )  # fmt: skip


def _tensor(value: Any) -> Tensor:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
