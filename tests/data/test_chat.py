"""Of a chat only what the assistant says is trained on, whatever the template does."""

from copy import deepcopy

import pytest
from tokenizers import processors

from graft.data.chat import assistant_spans
from graft.data.render import render
from graft.data.tokenizers import CHAT_TEMPLATE
from graft.errors import DataError

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)

REASONS = (
    "{% for m in messages %}{{ '<s>' + m.role + ':' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '(thinks)' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ m.content.split(')')[-1] | trim }}{% else %}{{ m.content }}{% endif %}"
    "{{ '</s>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
"""Only the last answer keeps its reasoning, as in Qwen's and DeepSeek's."""
COUNTS = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<s>' + m.content + '</s>' }}{% endfor %}"
)
FORGETS = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"


def with_template(letters, template):
    tokenizer = deepcopy(letters)
    tokenizer.chat_template = template or letters.chat_template
    return tokenizer


def said_in(messages, tokenizer):
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return [text[first:last] for first, last in assistant_spans(messages, tokenizer)]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, ["hello</s>\n", "see you</s>\n"]),
        (CHATML, ["hello<|im_end|>\n", "see you<|im_end|>\n"]),
        (LLAMA2, [" hello </s>", " see you </s>"]),
    ],
)
def test_of_a_chat_only_what_the_assistant_says_is_trained_on(letters, template, said):
    tokenizer = with_template(letters, template)
    assert said_in(CHAT, tokenizer) == said
    (found,) = render([{"messages": CHAT}], "chat", tokenizer)
    assert letters.decode(found.ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert letters.decode(found.ids[found.trained]) == "".join(said)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (REASONS, ["hello</s>", "(thinks)see you</s>\n"]),
        (COUNTS, ["hello", "see you"]),
        (CHAT_TEMPLATE + "{{ messages | length }}", ["hello</s>", "see you</s>"]),
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_understood(letters, template, said):
    assert said_in(CHAT, with_template(letters, template)) == said


def test_answers_that_hold_one_another_are_told_apart(letters):
    chat = [
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "no no"},
        {"role": "assistant", "content": "no no no"},
    ]
    for template in (None, CHATML, LLAMA2, REASONS, COUNTS):
        found = said_in(chat, with_template(letters, template))
        assert [text.count("no") for text in found] == [1, 3]


def test_an_assistant_may_speak_first(letters):
    chat = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}]
    assert said_in(chat, letters) == ["hello</s>"]


def test_a_chat_that_the_template_refuses_is_named_by_its_roles(letters):
    tokenizer = with_template(letters, ALTERNATES)
    assert said_in(CHAT[1:], tokenizer) == ["<s>hello</s>", "<s>see you</s>"]
    with pytest.raises(DataError, match=r"refuses a chat with the roles system, user, .* \(roles must alternate\)"):
        assistant_spans(CHAT, tokenizer)


def test_a_template_that_leaves_out_the_assistant_is_refused(letters):
    with pytest.raises(DataError, match="leaves out turn 3, which the assistant says: 'hello'"):
        assistant_spans(CHAT, with_template(letters, FORGETS))


def test_a_tokenizer_without_a_template_is_refused(letters):
    tokenizer = deepcopy(letters)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="this one has none"):
        assistant_spans(CHAT, tokenizer)


def test_spaces_that_the_assistant_says_are_trained_on_whatever_a_tokenizer_says_of_their_place(letters):
    tokenizer = deepcopy(letters)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    chat = [{"role": "user", "content": "a  b"}, {"role": "assistant", "content": "if x:\n    y"}]
    (found,) = render([{"messages": chat}], "chat", tokenizer)
    assert letters.decode(found.ids[found.trained]) == "if x:\n    y</s>\n"
