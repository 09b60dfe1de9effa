"""Records of data sets as text: the formats in which fine-tuning data is published."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

_TEXT_FIELDS = ("text", "content")
_CHAT_FIELDS = ("messages", "conversations", "conversation", "data")
_ROLE_FIELDS = {"role", "from"}
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
# Roles and the senders of ShareGPT's conversations, in small letters, under the names that chat templates know.
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai", "function_call"), "assistant"
    ),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}
# A field of such a name, or one that ends in "_id" and the like, is no text because it is the only one.
_IDENTIFIERS = frozenset(
    "id uuid guid idx index key hash sha sha1 sha256 md5 url uri link source path file filename label split".split()
)
_KNOWN = (
    "a record is a string, or has a text ('text', 'content'), a chat ('messages', 'conversations', 'conversation', "
    "'data' as in UltraChat), a request and its reply ('prompt' and 'completion'; 'prompt', 'instruction', 'question' "
    "or 'query' with 'response' or 'chosen'; 'instruction' or 'input' with 'output'; 'question' and 'answer'), "
    "'chosen', or one field alone that is no identifier"
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
    if _is_bad_example(record):
        return ""
    # As in TRL, a chat is read rather than text beside it, which is a title or was written for another template.
    for name in _CHAT_FIELDS:
        if _is_chat(record, name):
            return _chat_text(record, name, where, tokenizer)
    for name in _TEXT_FIELDS:
        if isinstance(record.get(name), str) and record[name].strip():
            return record[name]
    if _has(record, "prompt", "completion"):
        prompt, completion = _both(record, "prompt", "completion", where)
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        return _rendered(record, _exchange(prompt, completion, ("prompt", "completion"), where), where, tokenizer)
    for request, reply in _PAIRS:
        if _has(record, request, reply) and (reply != "chosen" or record[request] is not None):
            return _pair(record, request, reply, where, tokenizer)
    if record.get("chosen") is not None:
        return _field(record, "chosen", where, tokenizer)
    for name in _CHAT_FIELDS:
        value = record.get(name)
        if (isinstance(value, list) and not _strings(value)) or (name == "messages" and value is not None):
            _chat(value, name, where)  # says what is wrong with it
    # Data sets fill the missing fields of a row with None.
    if any(name in record and (record[name] is None or isinstance(record[name], str)) for name in _TEXT_FIELDS):
        return ""
    if len(record) == 1:
        ((name, value),) = record.items()
        if isinstance(value, str) and not (_is_identifier(name) and len(value.split()) < 2):
            return value
    raise ValueError(f"text: {where} {_fields(record)}; {_KNOWN}: {_REMEDY}")


def _is_chat(record: Mapping[str, Any], name: str) -> bool:
    """Say whether a record's field holds a chat, perhaps with malformed messages."""
    value = record.get(name)
    if value is not None and _strings(value):  # turns; under "data" only in UltraChat, elsewhere documents
        return name != "data" or ("id" in record and len(value) % 2 == 0)
    return isinstance(value, list) and any(isinstance(turn, Mapping) and turn.keys() & _ROLE_FIELDS for turn in value)


def _is_bad_example(record: Mapping[str, Any]) -> bool:
    """Say whether a record is one of KTO's bad examples, as TRL or LLaMA-Factory mark them."""
    replies = _has(record, "prompt", "completion") or any(_is_chat(record, name) for name in _CHAT_FIELDS)
    return record.get("kto_tag") is False or (record.get("label") is False and replies)


def _strings(values: Any) -> bool:
    return isinstance(values, list | tuple) and bool(values) and all(isinstance(value, str) for value in values)


def _is_identifier(name: Any) -> bool:
    return str(name).lower().replace("-", "_").rpartition("_")[2] in _IDENTIFIERS


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
    return _rendered(record, _message(value) or _chat(value, field, where), where, tokenizer)


def _chat_text(record: Mapping[str, Any], field: str, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a record's chat, with the reply that its field "chosen" may have to it."""
    chat, chosen = _chat(record[field], field, where), _reply(record.get("chosen"))
    if chosen and isinstance(chosen, str | list) and chat[-1]["role"] != "assistant":
        chat = _exchange(chat, chosen, (field, "chosen"), where)
    return _rendered(record, chat, where, tokenizer)


def _message(value: Any) -> list[dict[str, Any]] | None:
    """Return a single message as a chat, None if the value is something else."""
    return _chat([value], "", "") if isinstance(value, Mapping) and _is_message(value) else None


def _is_message(turn: Mapping[str, Any]) -> bool:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    return isinstance(role, str) and (isinstance(content, str | list) or bool(turn.get("tool_calls")))


def _reply(value: Any) -> Any:
    """Return a reply as a string or a chat: the first of several strings, which are alternatives."""
    return value[0] if _strings(value) else _message(value) or value


def _both(record: Mapping[str, Any], one: str, other: str, where: str) -> tuple[Any, Any]:
    """Return the values of two fields, a request and its reply, each a string or a chat."""
    values = _message(record[one]) or record[one], _reply(record[other])
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
    chat = _history(record, where) + _exchange(request, reply, (request_field, reply_field), where)
    return _rendered(record, chat, where, tokenizer)


def _history(record: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the earlier turns of a request, which LLaMA-Factory has as pairs of a request and its reply."""
    history = record.get("history")
    if not isinstance(history, list | tuple) or not history:
        return []
    if all(_strings(pair) and len(pair) == 2 for pair in history):
        history = [turn for pair in history for turn in pair]
    return _chat(history, "history", where)


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
        # A weight of 0 means that a message is not learned. It is read all the same: the model still sees it.
        kept = turn if "role" in turn else {}
        message = {**kept, "role": _ROLES.get(role.lower(), role)}
        messages.append(message if content is None and "role" in turn else {**message, "content": content})
    return messages


def _rendered(
    record: Mapping[str, Any], chat: list[dict[str, Any]], where: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return a record's chat, with its system message and tools, as the tokenizer's chat template writes it.

    Without a template: what was said, line by line.
    """
    messages = _with_system(chat, record)
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n".join(_plain(message.get("content")) for message in messages)
    tools = _tools(record)
    options: dict[str, Any] = {"tools": tools} if tools else {}

    def render(messages: list[dict[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    errors: list[tuple[str, Exception | None]] = []
    # Some templates take contents that are strings, some take lists of parts.
    for form in (messages, _with_contents(messages, _plain), _with_contents(messages, _parts)):
        try:
            text = render(form)
        except Exception as error:  # a template is a program and can raise any exception
            errors.append((f"are rejected by the tokenizer's chat template: {' '.join(f'{error}'.split())}", error))
            continue
        if any(isinstance(content := message.get("content"), list) and repr(content) in text for message in form):
            continue  # the template took the parts for a string
        role = _dropped(form, text, render)
        if role is None:
            return text
        errors.append((f"with the role '{role}' are left out by the tokenizer's chat template", None))
    reason, cause = errors[0]
    raise ValueError(
        f"text: the messages of {where} {reason}; change them, or write the text for the model into a field 'text'"
    ) from cause


def _tools(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the functions that a chat may call; none if they are not a list of JSON schemas."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            return []
    return tools if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools) else []


def _dropped(messages: list[dict[str, Any]], text: str, render: Callable[[list[dict[str, Any]]], str]) -> str | None:
    """Return the role of a message whose content does not change the rendered text; None if all do."""
    marks = [f" (mark {number})" for number in range(len(messages))]
    marked = [_with_contents([m], partial(_marked, mark=mark))[0] for m, mark in zip(messages, marks, strict=True)]

    def rendered(changed: list[dict[str, Any]]) -> str | None:
        try:
            return render(changed)
        except Exception:  # a template that reads a content can refuse another
            return None

    together = rendered(marked) or ""
    for number, message in enumerate(messages):
        if marks[number] in together or not _plain(message.get("content")).strip():
            continue
        # The template may write a content in another way, so that the mark is not found.
        if rendered(messages[:number] + marked[number : number + 1] + messages[number + 1 :]) == text:
            return str(message["role"])
    return None


def _marked(content: Any, mark: str) -> Any:
    """Return a content with a mark at the end of its text."""
    if isinstance(content, str):
        return content + mark
    return [
        {**part, "text": f"{part['text']}{mark}"} if isinstance(part, Mapping) and "text" in part else part
        for part in content
    ]


def _with_contents(messages: list[dict[str, Any]], form: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Return the messages with their contents in another form; one without content is left as it is."""
    return [m if m.get("content") is None else {**m, "content": form(m["content"])} for m in messages]


def _parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _plain(content: str | list[Any] | None) -> str:
    """Return the text of a message's content, which may be a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
    return "".join(part for part in parts if isinstance(part, str))
