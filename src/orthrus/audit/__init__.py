"""Audits output token for token against the stock model or plain decoding, and explains every difference."""

from orthrus.audit.compare import AuditOptions, run_audit
from orthrus.audit.full import FullOptions
from orthrus.audit.report import AuditReport

__all__ = ["AuditOptions", "AuditReport", "FullOptions", "run_audit"]
