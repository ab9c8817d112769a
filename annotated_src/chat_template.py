"""A conversation as the one text that a chat model was trained on."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What an answer's thinking is called, the name that templates prefer first.
THINKING = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **special_tokens: str,
) -> str:
    """Write a conversation out, ending where the assistant's answer begins.

    special_tokens are what the template may call by name, such as bos_token. Templates
    come with checkpoints, from strangers: they run in a sandbox, on copies in plain
    types. It keeps them from Python's inside, not from taking long.

    Raises:
        ValueError: messages are not objects with role and content, or the template is
            not valid, refuses them, or reaches for what the sandbox hides.

    Source: transformers `apply_chat_template`, `render_jinja_template`.
    """
    given = {
        "messages": plain_messages(messages),
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        compiled = _environment().from_string(template)
        return compiled.render({**given, **special_tokens})
    except Exception as error:  # a template is a program: anything can come of it
        raise ValueError(f"chat template: {error or type(error).__name__}") from error


def read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Find a directory's template: its own file, or in its tokenizer_config.json.

    Of several in a list, the one named default.

    Raises:
        ValueError: what stands there is neither.
    """
    if (own_file := directory / "chat_template.jinja").exists():
        return own_file.read_text("utf-8")
    found = template = config.get("chat_template")
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        named = {entry.get("name"): entry.get("template") for entry in entries}
        template = named.get("default", found)
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{directory}: chat_template is {found!r}, not a string")
    return template


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy the messages in JSON's types, without the entries that are None.

    Raises:
        ValueError: there are none, or one lacks its role or content.
    """
    if isinstance(messages, Mapping | str) or not isinstance(messages, Sequence):
        raise ValueError(f"messages are {messages!r}, expected a list of objects")
    if not messages:
        raise ValueError("messages are an empty list, expected at least one")
    return [_plain_message(i, message) for i, message in enumerate(messages)]


def _plain_message(place: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {place} is {message!r}, expected an object")
    kept = {name: entry for name, entry in message.items() if entry is not None}
    if not isinstance(role := kept.get("role"), str):
        raise ValueError(f"message {place}: role is {role!r}, expected a string")
    # A content can be text or a list of parts; a call of a tool needs none.
    content = kept.get("content", "" if "tool_calls" in kept else None)
    if not isinstance(content, str | list):
        raise ValueError(f"message {place}: content is {content!r}, expected a string")
    try:
        plain = json.loads(json.dumps(kept))
    except (TypeError, ValueError) as error:
        raise ValueError(f"message {place}: {error}") from error
    if named := [name for name in THINKING if name in plain]:
        thought = plain[named[0]]
        plain = {"thinking": thought, **plain, "reasoning_content": thought}
    return plain


class GenerationBlock(Extension):
    """Let `{% generation %}`, which marks what to train on, stand in a template."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """Prepare what templates may use: jinja's own, and four names by custom."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as the model saw it; jinja's own filter escapes HTML and letters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
