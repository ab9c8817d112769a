"""Our templates of the kinds in use, rendered here and by transformers."""

import copy
import re
from datetime import datetime
from types import MappingProxyType

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from annotated_src.chat_template import GenerationBlock, render_chat

SMOLLM2 = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are of help<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% set rounds = messages[1:] %}
{% else %}
{% set system, rounds = '', messages %}
{% endif %}
{% for message in rounds %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('user and assistant must take turns, found ' + message.role) }}
{% endif %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') }}\
{{ message['content'].strip() + ' [/INST]' }}
{% else %}
{{ ' ' + message['content'] | trim + ' ' + eos_token }}
{% endif %}
{% endfor %}"""
LLAMA_3 = """\
{{- bos_token }}
{%- set first = namespace(seen=false) %}
{%- for message in messages %}
    {%- set head = '<|start|>' + message.role + '<|end|>\\n\\n' %}
    {%- if not date_string is defined %}
        {%- set date_string = strftime_now('%d %b %Y') if not first.seen else '' %}
    {%- endif %}
    {%- if loop.first and tools is not none %}{{- tools | tojson }}{%- endif %}
    {{- message | tojson(indent=2, sort_keys=true) }}
    {%- if not first.seen %}{{- '[' + date_string + ']' }}{%- endif %}
    {%- set first.seen = true %}
    {{- head + message.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
CHATML = """\
{% for m in messages %}
{{ '<|im_start|>' + m.role }}
{% generation %}
{{- '\\n' + m['content'] + '<|im_end|>' }}
{% endgeneration %}

{% endfor %}
{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"""
QWEN = """\
{%- if tools %}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{%- continue %}{%- endif %}
    {%- if loop.index > 7 %}{%- break %}{%- endif %}
    {{- '<|im_start|>' ~ message.role }}
    {%- if message.reasoning_content %}
        {{- '\\n<think>' + message.reasoning_content + '</think>' }}
    {%- endif %}
    {%- if message.content is string %}{{- '\\n' + message.content }}{%- endif %}
    {%- for part in message.content if part is mapping %}
        {{- '\\n' + part.text }}
    {%- endfor %}
    {%- for call in message.tool_calls %}
        {{- '\\n' + call | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TEMPLATES = {
    "smollm2": SMOLLM2,
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3,
    "chatml": CHATML,
    "qwen": QWEN,
    "bare": "{{ messages }}{{ bos_token }}{{ documents is none }}{{ nobody }}",
}
ROUNDS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Hi! Wie geht\'s? <b>3 & 4</b> "你好" \n'},
    {"role": "assistant", "content": "  Gut\n"},
    {"role": "user", "content": ""},
]
CHATS = {"rounds": ROUNDS, "no system": ROUNDS[1:], "one": ROUNDS[1:2]}
CALL = {"name": "<look>", "arguments": {"wort": "größer & 大", "n": 1.5}}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
RICH = [
    {"role": "user", "content": PARTS, "name": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "yes", "thinking": "hm"},
    {"role": "assistant", "content": "no", "reasoning_content": "so", "reasoning": "x"},
    *ROUNDS,
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def theirs():
    """What a transformers tokenizer writes, whatever its vocabulary."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)

    def render(template, messages, add_generation_prompt=True):
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    return render


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_equals_transformers(theirs, name, chat, prompted):
    given = TEMPLATES[name], CHATS[chat]
    text = render_chat(*given, add_generation_prompt=prompted, **SPECIAL)
    assert text == theirs(*given, prompted)
    assert "Wie geht's?" in text or name == "bare"


def test_the_real_template_equals_transformers(smollm2_dir, theirs):
    template = (smollm2_dir / "chat_template.jinja").read_text("utf-8")
    for chat in CHATS.values():
        assert render_chat(template, chat) == theirs(template, chat)


def test_a_message_of_parts_calls_and_thoughts_equals_transformers(theirs):
    text = render_chat(QWEN, RICH, **SPECIAL)
    assert text == theirs(QWEN, RICH)
    assert '"wort": "größer & 大"' in text
    assert "<think>hm</think>" in text
    assert "<think>so</think>" in text
    assert "\na\nb<|im_end|>" in text


def test_names_of_a_thought_equal_transformers(theirs):
    template = (
        "{% for m in messages %}{{ m.thinking }}/{{ m.reasoning_content }} {% endfor %}"
    )
    names = ("thinking", "reasoning", "reasoning_content")
    chat = [{"role": "assistant", "content": "", name: name} for name in names]
    chat.append(chat[0] | chat[1] | chat[2])
    chat.append(chat[0] | chat[1])
    chat.append(chat[1] | {"reasoning_content": None})
    assert render_chat(template, chat) == theirs(template, chat)


def test_the_messages_stay_as_they_were():
    messages = copy.deepcopy(RICH)
    render_chat(QWEN, messages)
    assert messages == RICH


def test_the_date_is_that_of_today():
    text = render_chat("{{ strftime_now('%Y-%m') }}", ROUNDS)
    assert datetime.strptime(text, "%Y-%m").year >= 2024


def test_blocks_leave_no_lines(theirs):
    template = (
        "{% for message in messages %}\n"
        "  {% if true %}\n"
        "{{ message['content'] }};\n"
        "  {% endif %}\n"
        "{% endfor %}\n"
    )
    assert render_chat(template, ROUNDS[:1]) == "Be brief.;\n"
    assert theirs(template, ROUNDS[:1]) == "Be brief.;\n"


def test_a_variable_of_a_generation_block_stays_inside(theirs):
    assert GenerationBlock.tags == {"generation"}
    template = "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}[{{ x }}]"
    assert render_chat(template, ROUNDS) == theirs(template, ROUNDS) == "1[]"


HOSTILE = {
    "mro": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "subclasses": ("{{ ().__class__.__base__.__subclasses__() }}", "unsafe"),
    "globals": ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
    "format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
    "function": ("{{ strftime_now.__code__.co_consts }}", "unsafe"),
    "join": ("{{ ['a'] | map(attribute='__class__.__mro__') | list }}", "unsafe"),
    "import": ("{{ cycler.__init__.__globals__.os.popen('id') }}", "unsafe"),
    "range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "append": ("{{ messages.append(1) }}", "unsafe|not safely"),
    "update": ("{{ messages[0].update(role='x') }}", "unsafe|not safely"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
}


@pytest.mark.parametrize(("template", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_template_cannot_reach_out(template, message):
    with pytest.raises(ValueError, match=f"chat template: .*({message})"):
        render_chat(template, ROUNDS)


BROKEN = {
    "{% if %}": "Expected an expression",
    "{{ raise_exception('only two rounds') }}": "only two rounds",
    "{{ nobody.name }}": "'nobody' is undefined",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages[0].content + 1 }}": "concatenate",
    "{{ messages[9].content }}": "has no element 9",
    "{% include 'x' %}": "no loader",
}


@pytest.mark.parametrize(("template", "message"), BROKEN.items())
def test_a_template_that_fails_says_so(template, message):
    with pytest.raises(ValueError, match=f"chat template: .*({message})"):
        render_chat(template, ROUNDS)


def test_users_text_is_no_template():
    text = "{{ ''.__class__.__mro__ }}{% for %}"
    messages = [{"role": "user", "content": text}]
    assert text in render_chat(SMOLLM2, messages)


NO_MESSAGES = [
    ([], "empty list"),
    ([{"content": "a"}], "message 0: role is None"),
    ([ROUNDS[0], {"role": "user"}], "message 1: content is None"),
    ([{"role": "user", "content": 3}], "message 0: content is 3"),
    ([{"role": 3, "content": "a"}], "message 0: role is 3"),
    ([{"role": "user", "content": "a", "x": object()}], "message 0: .*not JSON"),
    ([{"role": "user", "content": [{1, 2}]}], "message 0: .*not JSON"),
]


@pytest.mark.parametrize(("messages", "message"), NO_MESSAGES)
def test_messages_that_are_none(messages, message):
    with pytest.raises(ValueError, match=message):
        render_chat(SMOLLM2, messages)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages are 'hello', expected a list"),
        (ROUNDS[0], "messages are {'role'"),
        (None, "messages are None"),
        (["hello"], "message 0 is 'hello', expected an object"),
    ],
)
def test_messages_of_another_type(messages, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        render_chat(SMOLLM2, messages)


def test_any_mapping_will_do():
    messages = tuple(MappingProxyType(message) for message in ROUNDS)
    assert render_chat(SMOLLM2, messages) == render_chat(SMOLLM2, ROUNDS)
