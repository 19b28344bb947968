"""What becomes of one row on its own: parsed, made a conversation, rendered, cut.

Runs in whichever process tokenizes the row.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmtune.config.schema import TrainOn
from llmtune.data.example import Conversation
from llmtune.data.reading.data_files import DataFile
from llmtune.data.reading.parse import BadRow
from llmtune.data.reading.readers import Record
from llmtune.data.reading.records_of_files import parse_record
from llmtune.data.rendering.renderer import Renderer
from llmtune.data.rendering.row_warnings import RowWarning
from llmtune.data.rows.formats import UnusableRowError, conversation_of
from llmtune.data.rows.overlong import cut_example
from llmtune.errors import DataError

__all__ = ["Reason", "RowResult", "RowRules", "outcome_of", "too_long_reason"]

_ASSISTANT_RULES = frozenset({"last_assistant_message", "last_assistant_turn", "all_assistant_messages"})
_REASONING = ("reasoning_content", "reasoning", "thinking")


class RowRules(NamedTuple):
    """What decides about one row, beside the renderer."""

    train_on: TrainOn
    text_column: str | None
    min_length: int | None
    max_length: int
    overlong: str


class Reason(NamedTuple):
    """Why a row was not used whole: what, the field at fault, the fix."""

    what: str
    field: str | None = None
    fix: str | None = None
    whole_file: bool = False


class RowResult(NamedTuple):
    """One row's fate before it is compared with others: used, cut, dropped or bad, with its examples.

    `row_digest` is over the ids, `full_digest` over ids and weights of the whole row, before any cut.
    """

    file_index: int
    number: int
    fate: str
    reason: Reason | None = None
    notes: tuple[RowWarning, ...] = ()
    tokens: int = 0
    tokens_lost: int = 0
    pieces: tuple[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]], ...] = ()
    row_digest: bytes = bytes(16)
    full_digest: bytes = bytes(16)


def outcome_of(
    file_index: int, file: DataFile, record: Record | BadRow, format_name: str, renderer: Renderer, rules: RowRules
) -> RowResult:
    """Take one record all the way to its examples; whatever is wrong with it is in the outcome's reason."""
    if isinstance(record, BadRow):
        return _bad(file_index, record.number, record)
    row = parse_record(file, record)
    if isinstance(row, BadRow):
        return _bad(file_index, record.number, row)
    try:
        conversation = conversation_of(row, format_name, rules.text_column)
        _refuse_unanswered(conversation, rules.train_on)
        rendered = renderer.render(conversation)
    except UnusableRowError as refused:
        return RowResult(file_index, record.number, "bad", Reason(refused.what, refused.field, refused.fix))
    except DataError as error:
        problem = error.problems[0]
        return RowResult(file_index, record.number, "bad", Reason(problem.problem, None, problem.fix))
    lost = next((note for note in rendered.notes if note.code == "not-rendered"), None)
    if lost is not None:
        fix = "set `model.chat_template` to a template that renders it, or take it out of the row"
        return RowResult(file_index, record.number, "bad", Reason(lost.text, "messages", fix))
    ids = np.asarray(rendered.input_ids, dtype=np.int32)
    weights = np.asarray(rendered.weights, dtype=np.float32)
    notes = (*(note for note in rendered.notes if note.code != "no-trained-token"), *_conversation_notes(conversation))
    bare = RowResult(
        file_index, record.number, "used", None, notes, len(ids), 0, (), _digest(ids), _digest(ids, weights)
    )
    return _fit(bare, conversation, ids, weights, renderer, rules)


def _fit(
    bare: RowResult,
    conversation: Conversation,
    ids: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
    renderer: Renderer,
    rules: RowRules,
) -> RowResult:
    """Drop what is too short or trains nothing, cut what is too long."""
    tokens = len(ids)
    lost = bare._replace(fate="dropped", tokens_lost=tokens)
    if conversation.text is not None and rules.min_length is not None and tokens < rules.min_length:
        return lost._replace(reason=Reason(f"shorter than `data.min_length` of {rules.min_length} tokens"))
    if not weights.any():
        unstable = next((note.text for note in bare.notes if note.code == "unstable"), None)
        if unstable is not None:
            fix = "give a template that renders answers after the prompt it gives: `model.chat_template=FILE`"
            return lost._replace(reason=Reason(f"the row has no trained token: {unstable}", None, fix))
        fix = f"check its weights, and that `data.train_on` ({rules.train_on}) is the rule you want"
        return lost._replace(reason=Reason("the row has no trained token", None, fix))
    if tokens <= rules.max_length:
        return bare._replace(pieces=((ids, weights),))
    too_long = too_long_reason(rules)
    if rules.overlong in ("error", "drop"):
        return lost._replace(reason=too_long)
    cut = cut_example(
        ids,
        weights,
        max_length=rules.max_length,
        policy=rules.overlong,
        end_token_ids=renderer.stop_token_ids,
        bos_token_id=renderer.vocabulary.bos_id,
    )
    if not cut.pieces:
        return lost._replace(reason=Reason(f"{too_long.what}, and nothing trained is left after {rules.overlong}"))
    reason = Reason(f"{too_long.what}: {rules.overlong}")
    return bare._replace(
        fate="cut",
        reason=reason,
        notes=(*bare.notes, *cut.notes),
        tokens_lost=cut.tokens_lost,
        pieces=tuple(cut.pieces),
    )


def too_long_reason(rules: RowRules) -> Reason:
    """Why an over-long row is not used, where it is not cut."""
    fix = "raise `data.max_length`, or set `data.overlong` to drop, truncate_right, truncate_left or split"
    return Reason(f"longer than `data.max_length` of {rules.max_length} tokens", None, fix)


def _bad(file_index: int, number: int, bad: BadRow) -> RowResult:
    return RowResult(file_index, number, "bad", Reason(bad.what, bad.field, bad.fix, bad.whole_file))


def _refuse_unanswered(conversation: Conversation, train_on: TrainOn) -> None:
    """Refuse a conversation whose answers are to be trained but are not there, or are empty."""
    if not conversation.messages:
        return
    answers = [message for message in conversation.messages if message.role == "assistant"]
    if train_on in _ASSISTANT_RULES and not answers:
        raise UnusableRowError(
            "messages",
            "no message is from the assistant, so nothing would be trained",
            "give the row an answer, or delete it",
        )
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant" or message.weight == 0 or message.content.strip():
            continue
        if not any(message.extra.get(name) for name in ("tool_calls", *_REASONING)):
            field = "completion" if conversation.prompt_is_text else f"messages[{index}].content"
            raise UnusableRowError(
                field, "the answer is empty", "give it a text, delete the row, or give the message weight 0"
            )


def _conversation_notes(conversation: Conversation) -> Iterator[RowWarning]:
    roles = [message.role for message in conversation.messages]
    for role in ("user", "assistant"):
        if any(one == other == role for one, other in itertools.pairwise(roles)):
            yield RowWarning("turns-in-a-row", f"two {role} messages in a row")
    if any(role == "system" for role in roles[1:]):
        yield RowWarning("late-system", "a system message that is not the first message")


def _digest(*arrays: npt.NDArray[np.int32] | npt.NDArray[np.float32]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(array.tobytes())
    return digest.digest()
