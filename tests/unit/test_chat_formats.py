"""What chat templates show of how a model writes."""

import pytest

from distributed_llm.api.chat.parsing.formats import Formats, detect_formats

QWEN3 = """
{%- if tools %}{{- '<|im_start|>system\\n# Tools' }}
  {{- 'return <tool_call>\\n{"name": <name>, "arguments": <json>}\\n</tool_call>' }}
{%- endif %}
{%- for message in messages %}
  {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
  {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
  {%- endif %}
{%- endif %}
"""

QWEN3_5 = QWEN3.replace(
    "{{- '<think>\\n\\n</think>\\n\\n' }}",
    "{{- '<think>\\n\\n</think>' }}{%- else %}{{- '<think>\\n' }}",
)

R1 = """
{%- for message in messages %}{% generation %}{{ message.content }}{% endgeneration %}{% endfor -%}
{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}
{#- </think> -#}
"""

DEEPSEEK = """
{%- for message in messages %}{{ message.content }}{% endfor -%}
{% if add_generation_prompt %}
{%- if not thinking %}{{ '</think>' }}{% else %}{{ '<think>' }}{% endif %}{% endif %}
"""

LLAMA = """
{{- 'Respond in the format {"name": function name, "parameters": dictionary of arguments}.' }}
{%- for message in messages %}{{ message.content }}{% endfor -%}
"""

MISTRAL = """
{%- for message in messages %}
  {%- if message.tool_calls %}{{ '[TOOL_CALLS][' }}{% endif %}
{%- endfor -%}
"""

THINK = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("template", "formats"),
    [
        (None, Formats()),
        ("{{ messages[0].content }}", Formats()),
        ("{% broken", Formats()),
        ("x" * 300_000 + "<tool_call>", Formats()),
        (QWEN3, Formats(reasoning=THINK, thinking_switch="enable_thinking", tagged_calls=True)),
        (
            QWEN3_5,
            Formats(
                reasoning=THINK,
                begins_thinking=(True, True, False),
                thinking_switch="enable_thinking",
                tagged_calls=True,
            ),
        ),
        (R1, Formats(reasoning=THINK, begins_thinking=(True, True, True))),
        (
            DEEPSEEK,
            Formats(
                reasoning=THINK, begins_thinking=(False, True, False), thinking_switch="thinking"
            ),
        ),
        (LLAMA, Formats(plain_calls=True)),
        (MISTRAL, Formats(listed_calls=True)),
    ],
)
def test_templates_show_formats(template: str | None, formats: Formats) -> None:
    assert detect_formats(template) == formats


def test_where_an_answer_begins_depends_on_the_switch() -> None:
    formats = detect_formats(QWEN3_5)
    assert formats.begins_inside({})
    assert formats.begins_inside({"enable_thinking": True})
    assert not formats.begins_inside({"enable_thinking": False})
    assert formats.begins_inside({"other": False})
