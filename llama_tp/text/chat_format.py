"""A conversation as token ids, in the Llama 3 chat format.

    <|begin_of_text|> then per message: <|start_header_id|> role <|end_header_id|> "\\n\\n" content <|eot_id|>
    and, for an answer, the header of an assistant message whose text the model writes.

Ids equal those of llama-models' `ChatFormat` (content as it is) and, with strip=True, of Meta's older llama3 package
(content stripped). Control ids come from here alone: content is encoded as plain text. Knows no tools yet.
"""

from typing import Literal, TypedDict

from llama_tp.spec.errors import UserError
from llama_tp.text.token_table import Tokenizer

Role = Literal["system", "user", "assistant", "ipython", "tool"]


class Message(TypedDict):
    """One turn. `ipython` (also spelled `tool`) carries the result of a tool call back to the model."""

    role: Role
    content: str


Dialog = list[Message]

_HEADER_ROLE = {"system": "system", "user": "user", "assistant": "assistant", "ipython": "ipython", "tool": "ipython"}
_CONTROL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


class ChatFormat:
    """Encodes messages for `tokenizer`. Raises UserError if it lacks one of the four control tokens."""

    def __init__(self, tokenizer: Tokenizer):
        lacking = [name for name in _CONTROL if name not in tokenizer.specials]
        if lacking:
            raise UserError("this is not a Llama 3 chat model", f"its tokenizer has no {', '.join(lacking)}",
                            "use an Instruct checkpoint, or send plain prompts")
        self.tokenizer = tokenizer
        self._bos, self._start, self._end, self._eot = (tokenizer.special_id(name) for name in _CONTROL)

    def encode_header(self, role: str) -> list[int]:
        """Ids that open a message of `role`."""
        if not isinstance(role, str) or role not in _HEADER_ROLE:
            raise UserError("a message has an unknown role", f"found {role!r}", f"use one of {', '.join(_HEADER_ROLE)}")
        # "\n\n" by itself, as Meta does: joined with the content it could merge into another token.
        return [self._start, *self.tokenizer.encode(_HEADER_ROLE[role]), self._end, *self.tokenizer.encode("\n\n")]

    def encode_message(self, message: Message, strip: bool = False) -> list[int]:
        """Ids of a whole message, ended by <|eot_id|>. UserError for anything but a role and a text."""
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            found = f"the keys {list(message)}" if isinstance(message, dict) else repr(message)[:80]
            raise UserError("a message must have exactly a role and a content", f"found {found}",
                            'write {"role": "user", "content": "..."}')
        content = message["content"]
        if not isinstance(content, str):
            raise UserError("the content of a message must be a text",
                            f"found {type(content).__name__} in a message of {message['role']!r}", "pass a string")
        body = self.tokenizer.encode(content.strip() if strip else content)
        return [*self.encode_header(message["role"]), *body, self._eot]

    def encode_dialog(self, messages: Dialog, strip: bool = False, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation, and of the header that asks for the assistant's answer if `add_generation_prompt`."""
        if not isinstance(messages, (list, tuple)):
            raise UserError("a dialog must be a list of messages", f"found {type(messages).__name__}",
                            'write [{"role": "user", "content": "..."}]')
        ids = [self._bos]
        for message in messages:
            ids += self.encode_message(message, strip)
        return ids + self.encode_header("assistant") if add_generation_prompt else ids
