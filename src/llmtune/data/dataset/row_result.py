"""Process one record by itself: parse it, make it a conversation, render it, cut it to length.

This runs in whichever process tokenizes the row.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from llmtune.config.schema import TrainOn
from llmtune.data.dataset.overlong import RAISE_LENGTH, cut_example, cut_sides, overlong_ways
from llmtune.data.example import REASONING_FIELDS, Conversation, Row, Side
from llmtune.data.reading.data_file import DataFile
from llmtune.data.reading.parse import BadRow, Record
from llmtune.data.rendering.renderer import Rendered, Renderer
from llmtune.data.rendering.row_warnings import UNSTABLE_WAYS_OUT, RowWarning
from llmtune.data.rows.field_names import WORDS_FOR_NOTHING, answer_field
from llmtune.data.rows.formats import UnusableRowError, conversation_of
from llmtune.data.rows.preferences import PREFERENCE_FORMATS
from llmtune.errors import DataError

__all__ = [
    "STATUSES",
    "Reason",
    "RowResult",
    "RowRules",
    "Status",
    "conversations_of",
    "process_record",
    "too_long_problem",
]

Status = Literal["used", "cut", "dropped", "duplicate", "held_out", "bad"]
STATUSES: tuple[Status, ...] = get_args(Status)
"""Tables hold a status by its index in this order."""

_ASSISTANT_RULES = frozenset({"last_assistant_message", "last_assistant_turn", "all_assistant_messages"})


Piece = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""Ids and weights [T] of one example."""


class RowRules(NamedTuple):
    """The settings that decide about a row by itself, beside those of the renderer; its source may have its own."""

    train_on: TrainOn
    text_column: str | None
    min_length: int | None
    max_length: int
    overlong: str


class Reason(NamedTuple):
    """Why a row was cut or not used: the problem, the field at fault, the fix."""

    problem: str
    field: str | None = None
    fix: str | None = None
    whole_file: bool = False


class RowResult(NamedTuple):
    """The status of one row before it is compared with others (used, cut, dropped or bad), and its examples.

    `pieces` holds (ids int32 [T], weights float32 [T]) of each example. `row_digest` is over the ids, `full_digest`
    over ids and weights, both of the complete row before any cut.
    """

    file_index: int
    number: int
    status: Status
    reason: Reason | None = None
    warnings: tuple[RowWarning, ...] = ()
    tokens: int = 0
    tokens_lost: int = 0
    pieces: tuple[Piece, ...] = ()
    row_digest: bytes = bytes(16)
    full_digest: bytes = bytes(16)
    answers: int = 0
    trained_answers: int = 0
    sides: tuple[Side, ...] = ()
    """The side of each of the `pieces`, where the row judges answers."""
    label: str | None = None
    margin: float = 0.0
    """What the row says of all its pieces."""


def process_record(
    file_index: int, file: DataFile, record: Record | BadRow, format_name: str, renderer: Renderer, rules: RowRules
) -> RowResult:
    """Make the examples of one record; every problem with it becomes the reason of the result."""
    source = file.source
    if source.train_on or source.text_column:
        text_column = source.text_column or rules.text_column
        rules = rules._replace(train_on=source.train_on or rules.train_on, text_column=text_column)
        renderer = renderer.with_rule(rules.train_on)
    row = file.parse(record)
    blank = RowResult(file_index, record.number, "bad")
    if isinstance(row, BadRow):
        return blank._replace(reason=Reason(row.problem, row.field, row.fix, row.whole_file))
    try:
        conversations = conversations_of(row, format_name, rules.text_column)
        for conversation in conversations:
            if conversation.side in ("prompt", "labelled"):
                continue
            _check_answers(conversation, rules.train_on, answer_field(row.fields, format_name))
        if conversations[0].side == "prompt":
            return _prompt(blank, conversations[0], renderer, rules)
        if conversations[0].side == "labelled":
            return _labelled(blank, conversations[0], renderer, rules)
        if conversations[0].side is not None:
            return _judged(blank, conversations, renderer, rules)
        rendered = renderer.render_examples(conversations[0])
    except UnusableRowError as error:
        name, column = error.field, source.columns.get(error.field or "")
        problem = f"{error.problem} (`columns` reads it from {column!r})" if column else error.problem
        return blank._replace(reason=Reason(problem, name, error.fix.replace(f"{{{name}}}", f"{{{column or name}}}")))
    except DataError as error:
        refusal = error.problems[0]
        return blank._replace(reason=Reason(refusal.problem, None, refusal.fix))
    result, examples = _of_examples(blank, conversations[0], rendered)
    if result.status == "bad":
        return result
    return _fit(result, conversations[0], [example for example in examples if example[1].any()], renderer, rules)


def conversations_of(row: Row, format_name: str, text_column: str | None = None) -> tuple[Conversation, ...]:
    """Make the conversations of a row in any format: one, or one for each side of a pair. Raises UnusableRowError."""
    if format_name in PREFERENCE_FORMATS:
        return PREFERENCE_FORMATS[format_name].parse(row)
    return (conversation_of(row, format_name, text_column),)


def _of_examples(
    blank: RowResult, conversation: Conversation, rendered: Sequence[Rendered]
) -> tuple[RowResult, list[Piece]]:
    """A used row, still without its pieces, and all examples of its conversation; or a bad row."""
    # Each once: the examples of one row share most of their messages.
    warnings = list(dict.fromkeys(warning for example in rendered for warning in example.warnings))
    lost = next((warning for warning in warnings if warning.code == "not-rendered"), None)
    if lost is not None:
        fix = "set `model.chat_template` to a template that renders it, or take it out of the row"
        return blank._replace(reason=Reason(lost.text, "messages", fix)), []
    examples = [
        (np.asarray(example.input_ids, dtype=np.int32), np.asarray(example.weights, dtype=np.float32))
        for example in rendered
    ]
    # "no-trained-token" becomes the reason why the row is dropped.
    warnings = [warning for warning in warnings if warning.code != "no-trained-token"]
    trained = [(ids, weights) for ids, weights in examples if weights.any()]
    result = blank._replace(
        status="used",
        warnings=(*warnings, *_conversation_warnings(conversation)),
        tokens=sum(len(ids) for ids, _ in trained or examples),
        row_digest=_digest(*(ids for ids, _ in examples)),
        full_digest=_digest(*(array for example in examples for array in example)),
        answers=sum(message.role == "assistant" for message in conversation.messages),
        trained_answers=sum(example.trained_answers for example in rendered),
    )
    return result, examples


def _judged(blank: RowResult, conversations: Sequence[Conversation], renderer: Renderer, rules: RowRules) -> RowResult:
    """The result of a row that judges answers: one example for each side. Raises DataError."""
    results: list[RowResult] = []
    for conversation in conversations:
        result, examples = _of_examples(blank, conversation, [renderer.render(conversation)])
        if result.status == "bad":
            return result
        results.append(result._replace(pieces=tuple(examples)))
    sides = tuple(conversation.side for conversation in conversations if conversation.side is not None)
    return _fit_sides(results, sides, renderer, rules)._replace(margin=conversations[0].margin)


_OF_MASKS = ("unstable", "no-end-of-turn", "joined-token", "weight-ignored")
"""Warnings about trained parts, of which a row that is classified has none."""


def _labelled(blank: RowResult, conversation: Conversation, renderer: Renderer, rules: RowRules) -> RowResult:
    """The result of a row that is classified: its last token, where the head reads, has the weight.

    Raises DataError.
    """
    result, examples = _of_examples(blank, conversation, [renderer.render(conversation)])
    if result.status == "bad":
        return result
    ids, name = examples[0][0], np.frombuffer((conversation.label or "").encode(), "u1")
    result = result._replace(
        warnings=tuple(warning for warning in result.warnings if warning.code not in _OF_MASKS),
        trained_answers=0,
        label=conversation.label,
        # The same text under two labels is no repetition.
        full_digest=_digest(ids, name),
    )
    # All of it counts for the cut, which so keeps an end token.
    result = _fit(result, conversation, [(ids, np.ones(len(ids), np.float32))], renderer, rules)
    pieces = tuple((ids, _last_alone(ids)) for ids, _ in result.pieces)
    side: Side = "labelled"
    return result._replace(pieces=pieces, sides=(side,) * len(pieces))


def _last_alone(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[1:][-1:] = 1.0
    return weights


def _prompt(blank: RowResult, conversation: Conversation, renderer: Renderer, rules: RowRules) -> RowResult:
    """The result of a row whose answers are drawn: the ids that `generate` would be given, none trained.

    Raises DataError.
    """
    if conversation.prompt_is_text:
        ids = renderer.text_prompt_ids(conversation.messages[0].content)
    else:
        ids = renderer.prompt_ids(conversation.messages, conversation.tools, conversation.template_args)
    piece = (np.asarray(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.float32))
    result = blank._replace(
        status="used",
        warnings=tuple(_conversation_warnings(conversation)),
        tokens=len(ids),
        pieces=(piece,),
        sides=("prompt",),
        row_digest=_digest(piece[0]),
        full_digest=_digest(*piece),
    )
    if len(ids) <= rules.max_length:
        return result
    return result._replace(
        status="dropped", tokens_lost=len(ids), pieces=(), sides=(), reason=_too_long_reason(rules, "prompt")
    )


def _fit(
    result: RowResult, conversation: Conversation, trained: Sequence[Piece], renderer: Renderer, rules: RowRules
) -> RowResult:
    """Drop a row that is too short or trains nothing, cut one with an example that is too long.

    `trained` holds its examples with a trained token.
    """
    dropped = result._replace(status="dropped", tokens_lost=result.tokens)
    if conversation.text is not None and rules.min_length is not None and result.tokens < rules.min_length:
        return dropped._replace(reason=Reason(f"shorter than `data.min_length` of {rules.min_length} tokens"))
    if not trained:
        return dropped._replace(reason=_untrained_reason(result, rules))
    lengths = [len(ids) for ids, _ in trained]
    if max(lengths) <= rules.max_length:
        return result._replace(pieces=tuple(trained))
    too_long = _too_long_reason(rules, conversation.side)
    if rules.overlong == "error" or (rules.overlong == "drop" and min(lengths) > rules.max_length):
        return dropped._replace(reason=too_long)
    pieces: list[Piece] = []
    warnings, tokens_lost = list(result.warnings), 0
    for ids, weights in trained:
        if len(ids) <= rules.max_length:
            pieces.append((ids, weights))
        elif rules.overlong == "drop":
            tokens_lost += len(ids)
        else:
            cut = cut_example(
                ids,
                weights,
                max_length=rules.max_length,
                policy=rules.overlong,
                end_token_ids=renderer.stop_token_ids,
                bos_token_id=renderer.vocabulary.bos_id,
            )
            pieces += cut.pieces
            warnings += cut.warnings
            tokens_lost += cut.tokens_lost
    if not pieces:
        problem = f"{too_long.problem}, and nothing trained is left after {rules.overlong}"
        return dropped._replace(reason=Reason(problem))
    return result._replace(
        status="cut",
        reason=Reason(f"{too_long.problem}: {rules.overlong}"),
        warnings=tuple(warnings),
        tokens_lost=tokens_lost,
        pieces=tuple(pieces),
    )


def _fit_sides(results: Sequence[RowResult], sides: tuple[Side, ...], renderer: Renderer, rules: RowRules) -> RowResult:
    """Join the sides of a row that judges answers; what happens to one of them happens to all."""
    pieces = tuple(result.pieces[0] for result in results)
    names = [side.encode() for side in sides]
    row = results[0]._replace(
        warnings=tuple(dict.fromkeys(warning for result in results for warning in result.warnings)),
        tokens=sum(result.tokens for result in results),
        pieces=pieces,
        sides=sides,
        row_digest=_digest(*(ids for ids, _ in pieces)),
        # The same answer as desirable and as undesirable is no repetition.
        full_digest=_digest(*(part for piece in pieces for part in piece), *(np.frombuffer(n, "u1") for n in names)),
        answers=sum(result.answers for result in results),
        trained_answers=sum(result.trained_answers for result in results),
    )
    dropped = row._replace(status="dropped", tokens_lost=row.tokens, pieces=(), sides=())
    for result, (_, weights) in zip(results, pieces, strict=True):
        if not weights.any():
            return dropped._replace(reason=_untrained_reason(result, rules))
    prompts = [ids[: int(np.flatnonzero(weights)[0])] for ids, weights in pieces]
    if not all(np.array_equal(prompts[0], prompt) for prompt in prompts):
        problem = "the prompt has other tokens before the chosen answer than before the rejected one"
        fix = "give both sides the same messages up to their answers, or another template (`model.chat_template=FILE`)"
        return dropped._replace(status="bad", tokens_lost=0, reason=Reason(problem, "prompt", fix))
    too_long = [side for side, (ids, _) in zip(sides, pieces, strict=True) if len(ids) > rules.max_length]
    if not too_long:
        return row
    reason = _too_long_reason(rules, sides[0])
    if rules.overlong in ("error", "drop"):
        return dropped._replace(reason=reason)
    cut = cut_sides(
        pieces,
        max_length=rules.max_length,
        policy=rules.overlong,
        end_token_ids=renderer.stop_token_ids,
        bos_token_id=renderer.vocabulary.bos_id,
    )
    named = f"{reason.problem} ({' and '.join(too_long)})"
    if not cut.pieces:
        return dropped._replace(reason=Reason(f"{named}, and {rules.overlong} leaves nothing to compare"))
    return row._replace(
        status="cut",
        reason=Reason(f"{named}: {rules.overlong}"),
        warnings=(*row.warnings, *cut.warnings),
        tokens_lost=cut.tokens_lost,
        pieces=tuple(cut.pieces),
    )


def _untrained_reason(result: RowResult, rules: RowRules) -> Reason:
    unstable = next((warning.text for warning in result.warnings if warning.code == "unstable"), None)
    if unstable is not None:
        return Reason(f"the row has no trained token: {unstable}", None, UNSTABLE_WAYS_OUT)
    fix = f"check its weights, and that `data.train_on` ({rules.train_on}) is the rule you want"
    return Reason("the row has no trained token", None, fix)


def _too_long_reason(rules: RowRules, side: Side | None) -> Reason:
    """The reason why a row over `max_length` is not used, where it is not cut."""
    return Reason(too_long_problem(rules), None, f"{RAISE_LENGTH}set `data.overlong` to {overlong_ways(side)}")


def too_long_problem(rules: RowRules) -> str:
    """What is wrong with a row over `max_length`, whatever serves it."""
    return f"longer than `data.max_length` of {rules.max_length} tokens"


def _check_answers(conversation: Conversation, train_on: TrainOn, last_field: str | None) -> None:
    """Raise UnusableRowError for a conversation whose trained answers are missing or empty.

    `last_field` names the field of the row that holds the last answer, where it is not in a list of messages.
    """
    if not conversation.messages:
        return
    answers = [message for message in conversation.messages if message.role == "assistant"]
    if train_on in _ASSISTANT_RULES and not answers:
        problem = "no message is from the assistant, so nothing would be trained"
        raise UnusableRowError("messages", problem, "give the row an answer, or delete it")
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant" or message.weight == 0 or message.content.strip():
            continue
        if not any(message.extra.get(name) for name in ("tool_calls", *REASONING_FIELDS)):
            is_last = last_field is not None and index == len(conversation.messages) - 1
            field = last_field if is_last else f"messages[{index}].content"
            fix = "give it a text, delete the row, or give the message weight 0"
            raise UnusableRowError(field, "the answer is empty", fix)


def _conversation_warnings(conversation: Conversation) -> Iterator[RowWarning]:
    for field in conversation.unused:
        yield RowWarning("unused-field", f"{field} is not used")
    for word in sorted({message.content for message in conversation.messages} & WORDS_FOR_NOTHING):
        yield RowWarning("missing-value", f"a message is `{word}`, which programs write where a value is missing")
    roles = [message.role for message in conversation.messages]
    for role in ("user", "assistant"):
        if any(role == first == second for first, second in itertools.pairwise(roles)):
            yield RowWarning("turns-in-a-row", f"two {role} messages in a row")
    if any(role == "system" for role in roles[1:]):
        yield RowWarning("late-system", "a system message that is not the first message")


def _digest(*arrays: npt.NDArray[np.int32] | npt.NDArray[np.float32] | npt.NDArray[np.uint8]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(array.tobytes())
    return digest.digest()
