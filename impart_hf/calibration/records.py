"""Records of data sets as text: the formats in which fine-tuning data is published."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_TEXT_FIELDS = ("text", "content")
_CHAT_FIELDS = ("conversations", "conversation", "data")  # besides "messages"
# A request and its reply, as data sets for instructions (Alpaca, Dolly), answers and preferences name them. The pairs
# are tried in this order: a record with an instruction, an input and an output is not one of input and output.
_PAIRS = (
    *(
        (request, reply)
        for request in ("prompt", "instruction", "question", "query")
        for reply in ("response", "chosen")
    ),
    ("instruction", "output"),
    ("question", "answer"),
    ("input", "output"),
)
_ADDITIONS = ("input", "context")  # what a request refers to, in a field of its own
_SYSTEM_FIELDS = ("system", "system_prompt")
# The senders of ShareGPT's conversations under the names that chat templates know.
_SENDERS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_KNOWN = (
    "a record is a string, or has a text ('text', 'content'), a chat ('messages', 'conversations', 'conversation', "
    "'data'), a request and its reply ('prompt' and 'completion'; 'prompt', 'instruction', 'question' or 'query' with "
    "'response' or 'chosen'; 'instruction' or 'input' with 'output'; 'question' and 'answer'), 'chosen', or one field "
    "alone"
)
_REMEDY = "name the field that holds the text or chat with --text-field, or write the text into a field 'text'"


def text_of(record: Any, where: str, tokenizer: PreTrainedTokenizerBase, field: str | None = None) -> str:
    """Return the text of one record, as `calibration_tokens` describes it.

    Args:
        record: a JSON value.
        where: the record's place, for messages.
        tokenizer: for its chat template.
        field: the only field to read; None to recognise the record's format.

    Raises:
        ValueError: if the record has no known format, or not what its format demands.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, Mapping):
        raise ValueError(f"text: {where} is {record!r:.80}, not a string or an object; {_KNOWN}")
    if field is not None:
        return _field(record, field, where, tokenizer)
    for name in _TEXT_FIELDS:
        if isinstance(record.get(name), str):
            return record[name]
    # Data sets fill the missing fields of a row with None.
    if record.get("messages") is not None:
        return _rendered(_chat(record["messages"], "messages", where), where, tokenizer)
    for name in _CHAT_FIELDS:
        if isinstance(record.get(name), list):
            return _field(record, name, where, tokenizer)
    if _has(record, "prompt", "completion"):
        prompt, completion = _both(record, "prompt", "completion", where)
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        return _rendered(_exchange(prompt, completion, ("prompt", "completion"), where), where, tokenizer)
    for request, reply in _PAIRS:
        if _has(record, request, reply) and (reply != "chosen" or record[request] is not None):
            return _pair(record, request, reply, where, tokenizer)
    if record.get("chosen") is not None:
        return _field(record, "chosen", where, tokenizer)
    if any(name in record and record[name] is None for name in _TEXT_FIELDS):
        return ""
    if len(record) == 1 and isinstance(value := next(iter(record.values())), str):
        return value
    raise ValueError(f"text: {where} {_fields(record)}; {_KNOWN}: {_REMEDY}")


def _has(record: Mapping[str, Any], *names: str) -> bool:
    return all(name in record for name in names) and any(record[name] is not None for name in names)


def _fields(record: Mapping[str, Any]) -> str:
    """Return a record's fields, each with the kind of its value, for a message."""
    kinds = {str: "string", bool: "truth value", int: "number", float: "number", list: "list", type(None): "null"}
    named = [f"{name} ({kinds.get(type(value), 'object')})" for name, value in record.items()]
    return f"has the fields {', '.join(named):.300}" if named else "has no fields"


def _field(record: Mapping[str, Any], field: str, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text or chat of one field."""
    if field not in record:
        raise ValueError(f"text: {where} {_fields(record)}, not '{field}': {_REMEDY}")
    value = record[field]
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return _rendered(_with_system(_chat(value, field, where), record), where, tokenizer)


def _both(record: Mapping[str, Any], one: str, other: str, where: str) -> tuple[Any, Any]:
    """Return the values of two fields, each a string or a chat."""
    values = record[one], record[other]
    if not all(isinstance(value, str | list | tuple) for value in values):
        raise ValueError(f"text: '{one}' and '{other}' of {where} are not both strings or chats: {_REMEDY}")
    return values


def _pair(
    record: Mapping[str, Any], request_field: str, reply_field: str, where: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return a request and its reply as a chat."""
    request, reply = _both(record, request_field, reply_field, where)
    if isinstance(request, str):
        additions = [record[n] for n in _ADDITIONS if n != request_field and isinstance(record.get(n), str)]
        request = "\n".join(part for part in (request, *additions) if part.strip())
    chat = _exchange(request, reply, (request_field, reply_field), where)
    return _rendered(_with_system(chat, record), where, tokenizer)


def _exchange(request: Any, reply: Any, fields: tuple[str, str], where: str) -> list[dict[str, Any]]:
    """Return request and reply, each a string or a chat, as one chat."""
    after = [_said("assistant", reply)] if isinstance(reply, str) else _chat(reply, fields[1], where)
    if after[0]["role"] in ("system", "user"):  # preferences often have the whole chat in the reply
        return after
    return ([_said("user", request)] if isinstance(request, str) else _chat(request, fields[0], where)) + after


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _with_system(chat: list[dict[str, Any]], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a chat that begins with the system message, if the record has one in a field of its own."""
    texts = (record.get(name) for name in _SYSTEM_FIELDS)
    system = [_said("system", text) for text in texts if isinstance(text, str) and text.strip()]
    return chat if chat[0]["role"] == "system" else system[:1] + chat


def _chat(turns: Any, field: str, where: str) -> list[dict[str, Any]]:
    """Return the messages of a chat.

    Args:
        turns: messages with "role" and "content" or with "from" and "value", or strings of which the first is the
            user's, the second the assistant's, and so on.
        field: where the record has them.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        raise ValueError(f"text: '{field}' of {where} must be a list of messages, got {turns!r:.80}: {_REMEDY}")
    if all(isinstance(turn, str) for turn in turns):
        return [_said(("user", "assistant")[number % 2], turn) for number, turn in enumerate(turns)]
    messages = []
    # Templates silently write nothing, or "None", for a missing field. The parts of a content list are not checked,
    # because templates accept different ones.
    for number, turn in enumerate(turns):
        named = f"text: message {number} of '{field}' of {where}"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{named} must be an object like the others, or all must be strings, got {turn!r:.80}")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str):
            raise ValueError(f"{named} must have a 'role' or 'from' that is a string, got {turn!r:.80}")
        content = turn.get("content", turn.get("value"))
        if not isinstance(content, str | list) and not turn.get("tool_calls"):
            raise ValueError(f"{named} must have a 'content' or 'value': a string or a list of parts, got {turn!r:.80}")
        if "role" in turn:
            messages.append(dict(turn) if content is None else {**turn, "content": content})
        else:
            messages.append({"role": _SENDERS.get(role.lower(), role), "content": content})
    return messages


def _rendered(messages: list[dict[str, Any]], where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat as the tokenizer's chat template writes it; without a template, what was said, line by line."""
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n".join(_plain(message.get("content")) for message in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program and can raise any exception
        reason = " ".join(f"{error}".split())
        raise ValueError(
            f"text: the messages of {where} are rejected by the tokenizer's chat template: {reason}; "
            "change them, or write the text for the model into a field 'text'"
        ) from error


def _plain(content: str | list[Any] | None) -> str:
    """Return the text of a message's content, which may be a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
    return "".join(part for part in parts if isinstance(part, str))
