"""The toolkit whose config a file is, by the keys it has."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from llmtune.config.aliases import translation_of
from llmtune.config.document import Entry, Listing, Table
from llmtune.config.importers.source import flatten
from llmtune.config.importers.tables import peer_names, peer_of
from llmtune.config.keys import LEAVES, SECTIONS

__all__ = ["Detected", "detect", "is_read_here", "looks_foreign"]

ENOUGH = 6
"""Points from which a file is taken for a peer's: one key that only this peer has, and one that it shares."""

KEYS_FOR_ONE_KNOWN = 100
"""More keys than this for each known one, and a file is no config: a vocabulary has every word."""


class Detected(NamedTuple):
    """A peer, and the keys by which it was recognised.

    points: those of its keys, less `ENOUGH` for each name of a key that its table lacks and llmtune itself reads.
    """

    peer: str
    keys: tuple[str, ...]
    points: int


def detect(table: Table) -> Detected | None:
    """Return the peer that the keys of a file speak for most; None where they speak for none."""
    for entry in table.entries:
        if entry.key == "$peer":  # a command line names its program
            return Detected(getattr(entry.value, "text", ""), ("the command",), ENOUGH)
    given, names = {given.name for given in flatten(table)}, _names(table)
    found = sorted((_points(peer, given, names) for peer in peer_names()), key=lambda found: -found.points)
    return found[0] if found and found[0].points >= ENOUGH else None


def looks_foreign(table: Table) -> Detected | None:
    """Return the peer of a file that does not have the sections of our configs, if it speaks for one."""
    own = [entry for entry in table.entries if entry.key in SECTIONS and isinstance(entry.value, Table)]
    found = detect(table)
    if found is None or (2 * len(own) >= len(table.entries) > 0 and found.points < 2 * ENOUGH):
        return None
    return found


def is_read_here(table: Table) -> bool:
    """Whether every key of a file is ours, or another name that configs take for one of ours."""
    return all(given.name in LEAVES or translation_of(given.name) is not None for given in flatten(table))


def _names(table: Table) -> set[str]:
    names = {given.name for given in flatten(table)}
    # A section counts by its own name too.
    names |= {name.rpartition(".")[0] for name in names}
    return names | set(_tables(table.entries))


def _tables(entries: Iterable[Entry]) -> Iterable[str]:
    return (entry.key for entry in entries if isinstance(entry.value, Table | Listing))


def _points(peer_id: str, given: Collection[str], names: Collection[str]) -> Detected:
    peer = peer_of(peer_id)
    keys = {key: points for key, points in peer.detect.items() if key in names}
    known = tuple(sorted((key for key, points in keys.items() if points > 0), key=lambda key: -keys[key]))
    if len(names) > KEYS_FOR_ONE_KNOWN * len(known):
        return Detected(peer_id, known, 0)
    points = sum(keys.values())
    if points >= ENOUGH:  # else it is not taken for this peer's anyway
        points -= ENOUGH * sum(translation_of(name) is not None and peer.row(name) is None for name in given)
    return Detected(peer_id, known, points)
