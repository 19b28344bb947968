"""The result of a verification: claims, measurements, and a verdict."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Finding", "Verdict"]


@dataclass(frozen=True)
class Finding:
    """One claim, its measurement, and whether the claim holds."""

    claim: str
    measured: str
    holds: bool


@dataclass
class Verdict:
    """All findings of one verification."""

    name: str
    findings: list[Finding] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    """Lines of figures above the claims."""

    def add(self, claim: str, measured: str, holds: bool) -> None:
        """Add one finding."""
        self.findings.append(Finding(claim, measured, holds))

    @property
    def passed(self) -> bool:
        """Whether there is a claim and every one holds."""
        return bool(self.findings) and all(finding.holds for finding in self.findings)

    def lines(self) -> list[str]:
        r"""Return the verdict as text: the table, a line for each claim, and PASS or FAIL.

        >>> verdict = Verdict("resume")
        >>> verdict.add("final weights equal", "2 files, 1,024 bytes, no difference", True)
        >>> print("\n".join(verdict.lines()))
        ok    final weights equal: 2 files, 1,024 bytes, no difference
        PASS  resume: 1 of 1 claims hold
        """
        lines = [
            f"{'ok  ' if finding.holds else 'FAIL'}  {finding.claim}: {finding.measured}" for finding in self.findings
        ]
        holding = sum(finding.holds for finding in self.findings)
        return [
            *self.table,
            *lines,
            f"{'PASS' if self.passed else 'FAIL'}  {self.name}: {holding} of {len(self.findings)} claims hold",
        ]
