"""What a verification found: each claim with what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Finding", "Verdict"]


@dataclass(frozen=True)
class Finding:
    """One claim, what was measured, and whether the claim holds."""

    claim: str
    measured: str
    holds: bool


@dataclass
class Verdict:
    """All findings of one verification."""

    name: str
    findings: list[Finding] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    """Figures that are shown above the claims."""

    def add(self, claim: str, measured: str, holds: bool) -> None:
        """Add one finding."""
        self.findings.append(Finding(claim, measured, holds))

    @property
    def passed(self) -> bool:
        """Whether at least one claim was looked at and every one holds."""
        return bool(self.findings) and all(one.holds for one in self.findings)

    def lines(self) -> list[str]:
        r"""The verdict as text: a line a claim, and PASS or FAIL with the first claim that does not hold.

        >>> verdict = Verdict("resume")
        >>> verdict.add("final weights equal", "2 files, 1,024 bytes, no difference", True)
        >>> print("\n".join(verdict.lines()))
        ok    final weights equal: 2 files, 1,024 bytes, no difference
        PASS  resume: 1 of 1 claims hold
        """
        lines = [f"{'ok  ' if one.holds else 'FAIL'}  {one.claim}: {one.measured}" for one in self.findings]
        holding = sum(one.holds for one in self.findings)
        return [
            *self.table,
            *lines,
            f"{'PASS' if self.passed else 'FAIL'}  {self.name}: {holding} of {len(self.findings)} claims hold",
        ]
