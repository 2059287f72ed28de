"""Arrays become the pictures of a report: PNG data URIs for images, short tables for everything else."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from gradleak.audit.numbers import sig
from gradleak.audit.records import REFUSED, Pictures, Record, Shown, Values

__all__ = ["capital", "encode_png", "picture"]

Array = npt.NDArray[Any]

_EXAMPLES = 16
_FRAMES = 80
_BYTES = 6_000_000
_VALUES = 24
_PLAIN = 1e-3, 1e7  # written without powers of ten


def encode_png(image: Array) -> str:
    """Return a (C, H, W) image in [0, 1] as a PNG data URI, pixel for pixel.

    One and three channels are gray and RGB; any other number is shown as gray panels side by side. Values outside
    [0, 1] are clipped and NaN is shown as black.
    """
    pixels = np.rint(np.clip(np.nan_to_num(image.astype(np.float64), nan=0.0), 0.0, 1.0) * 255).astype(np.uint8)
    pixels = pixels.transpose(1, 2, 0) if len(pixels) == 3 else np.concatenate(list(pixels), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture(record: Record, inputs: Array, truth: Array | None = None, snapshots: Array | None = None) -> Pictures:
    """Return what a report shows of the arrays beside ``record``.

    Args:
        record: says how inputs are shown, which reconstruction belongs to which private example, and in which order.
        inputs: (N, *shape) reconstructed inputs, in the attack's order; without examples where the attack did not run.
        truth: (N, *shape) private inputs.
        snapshots: (K, N, *shape) decoded candidates at the points of ``record.curves``.
    """
    subject, shown = record.subject, record.shown
    if record.outcome.status in REFUSED:
        return Pictures()
    if record.examples is not None and (truth is not None or (shown is not None and shown.truth is not None)):
        pairs = [(e.index, e.guess) for e in record.examples]
        titles = [f"{capital(subject.noun)} {e.index + 1}" for e in record.examples]
    else:
        truth = None
        pairs = [(i, i) for i in range(len(inputs))]
        what = capital(subject.noun) if subject.display == "text" else "Reconstruction"
        titles = [f"{what} {i + 1}" for i in range(len(inputs))] if len(inputs) > 1 else [what]
    pairs, titles, omitted = pairs[:_EXAMPLES], titles[:_EXAMPLES], max(0, len(pairs) - _EXAMPLES)
    if shown is not None:
        values = tuple(
            _texts(t, shown, i, g, record.examples is not None) for t, (i, g) in zip(titles, pairs, strict=True)
        )
        return Pictures(titles=tuple(titles), values=values, omitted=omitted)

    def pick(candidates: Array, guess: int | None) -> Array:
        # Fewer reconstructions than examples: mid-gray stands for none.
        return np.full_like(candidates[0], 0.5) if guess is None else candidates[guess]

    features = record.outcome.shows == "features"
    if subject.display != "pictures" or features or inputs.ndim != 4 or inputs.size == 0:
        tables = tuple(
            _table(
                f"{title}: what the last layer saw" if features else title,
                pick(inputs, g),
                None if truth is None else truth[i],
            )
            for title, (i, g) in zip(titles, pairs, strict=True)
        )
        return Pictures(titles=tuple(titles), values=tables, omitted=omitted)
    guesses = [g for _, g in pairs]
    pngs = tuple(encode_png(pick(inputs, g)) for g in guesses)
    frames = _frames(record, snapshots, sum(map(len, pngs)))
    return Pictures(
        titles=tuple(titles),
        truth=None if truth is None else tuple(encode_png(truth[i]) for i, _ in pairs),
        guess=pngs,
        frames=frames,
        snapshots=tuple(tuple(encode_png(pick(snapshots[k], g)) for g in guesses) for k in frames)
        if snapshots is not None
        else (),
        omitted=omitted,
    )


def capital(text: str) -> str:
    """Return ``text`` with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def _frames(record: Record, snapshots: Array | None, size: int) -> tuple[int, ...]:
    """Return which snapshots are shown: all, or as many as fit, spread evenly with both ends."""
    if snapshots is None or record.curves is None or len(snapshots) != len(record.curves.iterations):
        return ()
    count = min(len(snapshots), _FRAMES, max(2, _BYTES // max(size, 1)))
    return tuple(int(k) for k in np.unique(np.rint(np.linspace(0, len(snapshots) - 1, count)).astype(int)))


def _texts(title: str, shown: Shown, index: int, guess: int | None, scored: bool) -> Values:
    """Return one example as texts; an absent one, and one that is not in a damaged record, is empty."""
    truth = shown.truth[index] if scored and shown.truth is not None and index < len(shown.truth) else None
    found = shown.guess[guess] if guess is not None and guess < len(shown.guess) else ()
    if not shown.names:
        return Values(title, (), truth, found)
    count = len(truth) if truth is not None else len(found)
    names = shown.names[:count]
    padded = (*found, *("–" for _ in range(count - len(found))))[:count]
    right = shown.found[index] if truth is not None and shown.found is not None and index < len(shown.found) else ()
    right = right if len(right) == count else ()
    told = shown.confidence or ()
    sure = told[guess] if guess is not None and guess < len(told) and len(told[guess]) == count else ()
    return Values(title, (*names, *("" for _ in range(count - len(names)))), truth, padded, right, sure)


def _table(title: str, guess: Array, truth: Array | None) -> Values:
    flat = guess.reshape(-1)[:_VALUES]
    names = tuple(str([int(k) for k in np.unravel_index(i, guess.shape)]).strip("[]") for i in range(len(flat)))
    names = names if guess.ndim != 1 else tuple(str(i + 1) for i in range(len(flat)))
    private = None if truth is None else tuple(map(_value, truth.reshape(-1)[: len(flat)]))
    more = guess.size - len(flat)
    suffix = f" (first {len(flat)} of {guess.size:,} values)" if more > 0 else ""
    return Values(title + suffix, names, private, tuple(map(_value, flat)))


def _value(value: Any) -> str:
    if isinstance(value, (np.integer, np.bool_)):
        return str(int(value))
    number = float(value)
    if number == 0 or not _PLAIN[0] <= abs(number) < _PLAIN[1]:
        return sig(number, 4)
    return np.format_float_positional(number, precision=5, fractional=False, trim="-").replace("-", "−")
