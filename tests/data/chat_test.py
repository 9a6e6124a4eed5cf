import pytest

from rlhf_jax.data import chat

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello {{ 7 * 7 }}"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye bye"},
]


def test_hh_spans():
  assert chat.render_spans(TALK[1:], "hh") == (
      ("\n\nHuman: Hi\n\nAssistant:", False),
      (" Hello {{ 7 * 7 }}", True),
      ("\n\nHuman: Bye\n\nAssistant:", False),
      (" Bye bye", True),
  )


def test_plain_spans():
  assert chat.render_spans(TALK, "plain") == (
      ("Be kind.\n\nHi\n\n", False),
      ("Hello {{ 7 * 7 }}", True),
      ("\n\nBye\n\n", False),
      ("Bye bye", True),
  )


def test_jinja_template_trains_on_the_end_of_turn_mark():
  template = (
      "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
      "{% if add_generation_prompt %}<assistant>{% endif %}"
  )
  assert chat.render_spans(TALK[1:3], template) == (
      ("<user>Hi</><assistant>", False), ("Hello {{ 7 * 7 }}</>", True),
  )


@pytest.mark.parametrize("template, reason", [
    ("plane", "no chat template is called 'plane'"),
    ("{% for m in messages %}", "template of the config: "),
    ("{{ nothing_like_this }}", r"messages\[0\] \(system\) is not in"),
    ("{{ messages[-1].content }}", r"messages\[2\] \(assistant\): the longer"),
    ("{{ raise_exception('no system') }}", "no system"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
])
def test_bad_templates(template, reason):
  with pytest.raises(chat.ChatTemplateError, match=reason):
    chat.render_spans(TALK, template)
