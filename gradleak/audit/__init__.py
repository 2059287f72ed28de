"""Audits: trials, scores against a truth that no attack sees, and the records that reports are made of.

Nothing is imported here: the report reads ``gradleak.audit.records`` and must not load PyTorch with it.
"""
