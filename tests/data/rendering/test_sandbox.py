"""Nobody let in: a chat template is a program from somewhere else, and renders within limits of time, size and sense."""

import contextlib
import time
from datetime import datetime

import pytest

from llmtune.data.rendering.chat_template import ChatTemplate
from llmtune.data.rendering.limits import Limits, TemplateRefusal
from llmtune.data.rendering.provenance import Traced, runs_of
from llmtune.errors import TokenizerError

LIMITS = Limits(seconds=0.3, characters=100_000)
TALK = [{"role": "user", "content": "hello"}]


def render(source, messages=TALK):
    template = ChatTemplate(source, variables={"eos_token": "</s>"}, now=datetime(2025, 1, 1), limits=LIMITS)
    return template.render(messages, None, add_generation_prompt=False)


ENDLESS = {
    "a giant range": "{% for i in range(10**9) %}a{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested filters": "{% for i in range(99999) %}{{ range(9999) | map('string') | join | length }}{% endfor %}",
    "text that doubles with ~": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "text that doubles with +": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a list that doubles": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "text that is joined": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "text that is replaced": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x | replace('a', n.x) %}{% endfor %}",
    "text replaced by method": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
    "multiplied text": "{{ 'a' * 10**8 }}",
    "multiplied list": "{{ ([0] * 999999) | length }}",
    "giant powers": "{{ 10**10**10 }}",
    "growing powers": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x ** 9 %}{% endfor %}",
    "growing products": "{% set n = namespace(x=9) %}{% for i in range(9999) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "padding": "{{ 'a'.center(10**9) }}",
    "padding by filter": "{{ 'a' | center(10**9) }}",
    "slices": "{{ 'abc' | slice(10**9) | list }}",
    "wide formats": "{{ '%999999999d' % 1 }}",
    "wide formats by method": "{{ '{:>999999999}'.format(1) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless output": "{% for i in range(99999) %}{{ 'abcdefghij' * 10 }}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_asks_for_too_much_is_stopped_in_time(name):
    begin = time.monotonic()
    with pytest.raises(TemplateRefusal) as refusal:
        render(ENDLESS[name])
    assert refusal.value.is_limit
    assert time.monotonic() - begin < 3


def test_the_limit_of_size_grows_with_the_conversation():
    text = "a" * 300_000
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].content._runs.__class__.__base__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__.__class__ }}",
        "{{ messages.append({}) }}",
        "{{ '{0.__class__.__mro__}'.format(messages[0].content) }}",
        "{% set n = namespace(__class__=1) %}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_a_template_gets_at_nothing_but_its_conversation(source):
    """It is refused, or sees an undefined name, which prints nothing."""
    with contextlib.suppress(TemplateRefusal):
        assert not render(source, [{"role": "user", "content": Traced("hello", [(5, 0)])}])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for m in messages %}{{ m.content }", "line 1"),
        ("{% for m in messages %}\n{{ m.content | nosuchfilter }}{% endfor %}", "nosuchfilter"),
        ("{% endfor %}", "endfor"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not compile"),
    ],
)
def test_a_text_that_is_no_template_is_named(source, says):
    with pytest.raises(TokenizerError, match="the chat template does not compile") as error:
        render(source)
    assert says in str(error.value)
    assert "model.chat_template" in str(error.value)


def test_what_a_template_says_when_it_refuses_is_passed_on():
    with pytest.raises(TemplateRefusal, match="no system role here") as refusal:
        render("{{ raise_exception('no system role here') }}")
    assert not refusal.value.is_limit


def test_a_mistake_in_a_template_is_an_answer_too():
    with pytest.raises(TemplateRefusal, match="UndefinedError"):
        render("{{ messages[0].nothing.at.all }}")


def test_loops_still_know_their_length_and_their_end():
    source = "{% for m in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last else ',' }}{% else %}none{% endfor %}"
    assert render(source) == "1/3,2/3,3/3."
    assert (
        render(
            "{% for m in [] %}x{% else %}none{% endfor %}{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}"
        )
        == "nonea1"
    )
    assert (
        render(
            "{% for x in [1, 2, 3, 4] if x % 2 == 0 %}{{ x }}{{ loop.length }}{% if loop.index == 1 %}{% continue %}{% endif %};{% endfor %}"
        )
        == "2242;"
    )


def test_origins_survive_what_templates_do_to_text():
    content = Traced("  Hello, </think> world  ", [(25, 0)])
    text = render(
        "<a>{{ messages[0].content | trim }}</a>{{ messages[0].content.split('</think>')[-1].lstrip() }}!",
        [{"role": "user", "content": content}],
    )
    assert (text, runs_of(text)) == (
        "<a>Hello, </think> world</a>world  !",
        ((3, -1), (21, 0), (4, -1), (7, 0), (1, -1)),
    )
