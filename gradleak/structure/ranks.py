"""Counting rank instead of equations: what an update can determine at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.structure.probe import probe_inputs, run_quietly
from gradleak.training import output_tensors

__all__ = ["RankBound", "rank_bound"]


@dataclass(frozen=True)
class RankBound:
    """What the gradient of a batch can determine at most.

    Attributes:
        equations: gradient numbers, where the last layer counts as its inputs at most.
        effective: the smallest such count over all layers; the rest is redundant.
        unknowns: numbers of the batch's inputs.
        rank: upper bound on the rank of the gradient's Jacobian with respect to the inputs: the smaller of the two.
        layer: the layer at whose input the bound is met, "" where the inputs themselves are the bound.
        reason: one sentence for a reader.
    """

    equations: int
    effective: int
    unknowns: int
    rank: int
    layer: str
    reason: str

    @property
    def determined(self) -> bool:
        """Whether the bound leaves room for an exact reconstruction without a prior."""
        return self.rank >= self.unknowns


def rank_bound(model: nn.Module, params: Mapping[str, Tensor], shape: tuple[int, ...], batch_size: int) -> RankBound:
    """Return an upper bound on the rank of ∂(gradients)/∂(inputs) for a batch with known labels.

    Cut the network before any layer through whose input x all information flows. The gradients of the layers from there
    on are functions of the batch's x alone, so their rank is at most ``B · dim x``; those before count with their
    number of parameters. The bound is the smallest such sum over all cuts, and never more than the unknowns. Cuts are
    found by running the model with the layer's input detached, so residual branches are respected.

    Args:
        model: a module from inputs to outputs, in the client's mode.
        params: its trainable parameters by name (those in the update).
        shape: shape of one input.
        batch_size: number of examples.
    """
    like = next(iter(params.values()))
    probe = probe_inputs(shape, 2, like).requires_grad_()
    order, widths = _calls(model, params, probe)
    names = {id(p): k for k, p in model.named_parameters()}
    unknowns = batch_size * math.prod(shape)
    before: set[str] = set()
    cuts: list[tuple[int, str]] = []
    total = sum(p.numel() for p in params.values())
    for step, layer in enumerate(order):
        owned = [names[id(p)] for p in model.get_submodule(layer).parameters(recurse=False)]
        if before and _separates(model, params, probe, order, step):
            lower = sum(params[k].numel() for k in before if k in params)
            cuts.append((lower + min(total - lower, batch_size * widths[step]), layer))
        before.update(owned)
    equations = cuts[-1][0] if cuts else total
    best, layer = min(cuts, default=(total, ""))
    effective = best
    if best >= unknowns:
        best, layer = unknowns, ""
    batch = f"This model, {batch_size} example{'s' if batch_size > 1 else ''}"
    if layer:
        reason = (
            f"{batch}: the gradient determines at most {best:,} of {unknowns:,} numbers, because all layers from "
            f"{layer!r} on show no more than its inputs; no attacker without a prior can be exact here."
        )
    else:
        reason = (
            f"{batch}: {effective:,} effective equations for {unknowns:,} numbers; "
            "counting does not exclude an exact reconstruction."
        )
    return RankBound(equations, effective, unknowns, best, layer, reason)


def _leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(k, m) for k, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]


def _calls(model: nn.Module, params: Mapping[str, Tensor], probe: Tensor) -> tuple[list[str], list[int]]:
    """Return the layers with parameters in the order of their calls, and the size of one example at their input."""
    order: list[str] = []
    widths: list[int] = []

    def note(name: str, value: Tensor) -> None:
        order.append(name)
        widths.append(value.numel() // len(probe))

    handles = [m.register_forward_pre_hook(lambda _m, args, name=k: note(name, args[0])) for k, m in _leaves(model)]
    try:
        run_quietly(model, params, probe)
    finally:
        for handle in handles:
            handle.remove()
    return order, widths


def _separates(model: nn.Module, params: Mapping[str, Tensor], probe: Tensor, order: list[str], step: int) -> bool:
    """Return whether the output depends on the input only through the input of the ``step``-th call."""
    count = -1

    def cut(args: tuple[Tensor, ...], name: str) -> tuple[Tensor, ...] | None:
        nonlocal count
        count += 1
        return (args[0].detach(), *args[1:]) if count == step else None

    fixed = {k: p.detach() for k, p in params.items()}
    fixed.update({k: p.detach() for k, p in model.named_parameters() if k not in fixed})
    handles = [m.register_forward_pre_hook(lambda _m, args, name=k: cut(args, name)) for k, m in _leaves(model)]
    try:
        with torch.enable_grad():
            return not any(o.requires_grad for o in output_tensors(run_quietly(model, fixed, probe)))
    finally:
        for handle in handles:
            handle.remove()
