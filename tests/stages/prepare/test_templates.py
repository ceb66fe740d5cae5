"""Chat templates that a run names by their place: prepare reads them once, and every later stage takes its text."""

import pytest
from support.stage_builders import bucket_of, context, prepare_work

from cgd_stages.contract import Chat
from cgd_stages.errors import TransientError, UserError
from cgd_stages.models import resolve
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.prepare.tryout import read_template
from cgd_stages.runtime.inputs import MOST_BYTES

JINJA = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# é #}"
)
IN_A_CONFIG_MAP = Chat(template="configmap://templates/chat.jinja")


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "inputs"
    (folder / "templates").mkdir(parents=True)
    return folder


@pytest.fixture
def given(storage, tiny_model, tmp_path, inputs):
    return context(storage, prepare_work(tiny_model, "s3://data/p.jsonl"), tmp_path, inputs=inputs)


def in_the_store(given, data: bytes, key: str = "templates/chat.jinja") -> Chat:
    bucket = given.store.bucket
    bucket.put(key, data)
    return Chat(template=bucket.uri(key))


def test_an_inline_template_and_none_are_left_as_they_are(given):
    for chat in (Chat(), Chat(template=JINJA)):
        assert read_template(given, chat, "spec.student") is chat


def test_a_template_of_a_config_map_is_read_where_it_is_mounted(given, inputs):
    (inputs / "templates/chat.jinja").write_text(JINJA)
    chat = IN_A_CONFIG_MAP.model_copy(update={"thinking": "on"})
    assert read_template(given, chat, "spec.student") == chat.model_copy(update={"template": JINJA})


def test_a_config_map_that_is_not_mounted_yet_is_waited_for(given):
    with pytest.raises(TransientError, match=r"there is no configmap://templates/chat\.jinja yet") as raised:
        read_template(given, IN_A_CONFIG_MAP, "spec.student")
    assert "Apply a ConfigMap templates with the key chat.jinja" in raised.value.hint


def test_a_template_in_the_store_is_read_from_there(given):
    assert read_template(given, in_the_store(given, JINJA.encode()), "spec.teacher").template == JINJA


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "there is no object"),
        (b"", "holds no Jinja template"),
        (b"chatml", "holds no Jinja template"),
        (b"{\xff\xfe", "is not UTF-8"),
        (b"{" * (MOST_BYTES + 1), "has more than 1 MiB"),
    ],
)
def test_a_file_that_is_no_template_is_refused_with_the_field(given, data, words):
    chat = Chat(template=given.store.bucket.uri("nothing.jinja")) if data is None else in_the_store(given, data)
    with pytest.raises(UserError, match=words) as raised:
        read_template(given, chat, "spec.teacher")
    assert "spec.teacher.chat.template" in raised.value.hint


def test_later_stages_take_the_text_that_prepare_has_read(storage, tiny_model, tmp_path, inputs):
    file = inputs / "templates/chat.jinja"
    file.write_text(JINJA)
    bucket_of(storage).put("in/p.jsonl", b'{"question": "1 + 1?", "answer": "2"}\n')

    def digest(text: str) -> str:
        file.write_text(text)
        source = bucket_of(storage).uri("in/p.jsonl")
        work = prepare_work(tiny_model, source, student_chat=IN_A_CONFIG_MAP)
        given = context(storage, work, tmp_path, inputs=inputs)
        return prepare.main(given)["prepare"].digest

    first = digest(JINJA)
    file.write_text("{{ changed }}")
    store = context(storage, prepare_work(tiny_model, ""), tmp_path).store
    assert resolve.pinned_chat(IN_A_CONFIG_MAP, store).template == JINJA
    assert resolve.pinned_chat(Chat(template=JINJA), store) == Chat(template=JINJA)
    assert digest(JINJA + "{# another #}") != first
    with pytest.raises(UserError, match="prepare has not read s3://b/t"):
        resolve.pinned_chat(Chat(template="s3://b/t"), store)
