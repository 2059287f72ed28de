"""The record of one reconstruction: what ``result.json`` holds and all that a report may read.

Without tensors, so that a record can be read, compared and rendered where torch is not installed.
``docs/result-schema.md`` documents every field; :data:`SCHEMA` grows by one when a field changes its meaning.
"""

from gradleak.audit.records.fields import (
    NOTHING,
    SCHEMA,
    Aggregate,
    AttackRun,
    AttemptRecord,
    CertificateRecord,
    Curves,
    Example,
    FindingRecord,
    Lift,
    Match,
    Outcome,
    Pictures,
    Record,
    Shown,
    Subject,
    Success,
    Threat,
    Values,
    Verdict,
)
from gradleak.audit.records.text import from_json, to_json

__all__ = [
    "NOTHING",
    "SCHEMA",
    "Aggregate",
    "AttackRun",
    "AttemptRecord",
    "CertificateRecord",
    "Curves",
    "Example",
    "FindingRecord",
    "Lift",
    "Match",
    "Outcome",
    "Pictures",
    "Record",
    "Shown",
    "Subject",
    "Success",
    "Threat",
    "Values",
    "Verdict",
    "from_json",
    "to_json",
]
