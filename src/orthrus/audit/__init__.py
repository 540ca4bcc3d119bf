"""Prove: output token for token against the stock model or plain decoding, and every difference explained."""

from orthrus.audit.compare import AuditOptions, run_audit
from orthrus.audit.full import FullOptions
from orthrus.audit.report import AuditReport

__all__ = ["AuditOptions", "AuditReport", "FullOptions", "run_audit"]
