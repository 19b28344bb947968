"""A conversation of `llmtune chat`, and the commands that begin with a slash."""

from __future__ import annotations

import json
from pathlib import Path

from llmtune import durable
from llmtune.common.environment import home_expanded
from llmtune.common.text import printable
from llmtune.data.example import Message
from llmtune.errors import MachineError

__all__ = ["Conversation"]


class Conversation:
    """What was said so far."""

    help = "/reset forgets what was said, /system TEXT sets the system message, /save FILE keeps it, /exit ends"

    def __init__(self, system: str | None) -> None:
        self._system = system
        self.messages = self._start()

    def obey(self, line: str) -> str:
        """Carry out a command, and return what to say about it."""
        word, _, argument = line.partition(" ")
        actions = {"/reset": self._reset, "/system": self._set_system, "/save": self._save}
        return actions[word](argument.strip()) if word in actions else f"no command `{printable(word)}`; {self.help}"

    def _start(self) -> list[Message]:
        return [Message("system", self._system)] if self._system else []

    def _reset(self, argument: str) -> str:  # noqa: ARG002 - every command takes what stands behind it
        self.messages = self._start()
        return "forgotten"

    def _set_system(self, argument: str) -> str:
        self._system = argument or None
        said = [message for message in self.messages if message.role != "system"]
        self.messages = [*self._start(), *said]
        return "the system message is set" if argument else "there is no system message now"

    def _save(self, argument: str) -> str:
        if not argument:
            return "name a file: /save FILE"
        if len(self.messages) < 2:
            return "nothing was said yet"
        path = Path(home_expanded(argument))
        rows = [{"role": message.role, "content": message.content} for message in self.messages]
        try:
            # A row of training data: what was said well can be trained on.
            durable.append_line(path, json.dumps({"messages": rows}, ensure_ascii=False))
        except MachineError as error:
            return f"not saved: {error}"
        return f"added to {printable(path)} as a row of {len(rows)} messages"
